"""`report.md` and `report.html` of a run, made from its ledger and metrics and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from glasklar.audit.blocks import Block, Heading, Items, Paragraph, Plot, Table, Tiles, to_html, to_markdown
from glasklar.audit.facts import BASELINES, USD_PER_KWH, RunFacts, StageCost
from glasklar.audit.plots import plots
from glasklar.audit.verdict import Measured, what_rl_did
from glasklar.model.config import ModelConfig
from glasklar.model.cost import cache_bytes_per_token, count_parameters
from glasklar.provenance.energy import JOULES_PER_KWH
from glasklar.provenance.files import write_atomic
from glasklar.provenance.rundir import RunDir

# Columns of the table of results: figure, part of the evaluation that holds it, heading, what it is. Between the first
# and the others stand pass@1 and pass@k, whatever k was measured.
FIGURES = [
    ("greedy", "tasks", "greedy", "share"),
    ("thinking", "tasks", "thinking", "share"),
    ("direct", "tasks", "direct", "share"),
    ("greedy", "hard", "harder range", "share"),
    ("length", "tasks", "tokens", "count"),
]
NETWORK_FIGURES = ("bits_per_byte", "second_token_acceptance", "load_max_mean")


def write_report(run: RunDir) -> None:
    """Writes both files of a run, finished or not. Raises CheckpointError where the ledger does not hold."""
    for name, content in report_files(RunFacts.read(run)).items():
        write_atomic(run.path / name, content)


def report_files(facts: RunFacts) -> dict[str, bytes]:
    """Name -> content of both files; the same record gives the same bytes."""
    title = f"Run of the recipe {facts.recipe['name']}"
    subtitle = facts.recipe.get("description", "")
    blocks = report(facts)
    return {
        "report.md": to_markdown(title, subtitle, blocks, "report.html").encode(),
        "report.html": to_html(title, subtitle, blocks).encode(),
    }


def report(facts: RunFacts) -> list[Block]:
    """The blocks of the report; what was not measured is left out."""
    drawn = plots(facts)
    return [
        _tiles(facts),
        *_reinforcement(facts),
        *_accuracy(facts),
        *_also_measured(facts),
        *(Plot(plot.svg, plot.caption) for plot in drawn if plot.about == "rl"),
        *_baselines(facts),
        Heading("The recipe"),
        Items(recipe_in_words(facts.recipe)),
        Heading("Training"),
        *_warnings(facts),
        *(Plot(plot.svg, plot.caption) for plot in drawn if plot.about == "training"),
        *_costs(facts),
        Heading("Where this comes from"),
        Items(_origin(facts)),
    ]


# --- results ----------------------------------------------------------------------------------------------------------


def _tiles(facts: RunFacts) -> Tiles:
    tiles = []
    before, after = facts.before_rl, facts.after_rl
    if last := after or before:
        tiles.append(("Right on unseen problems", *_tile(facts, before, last, "greedy", percent)))
        tiles.append(("Tokens an answer", *_tile(facts, before, last, "length", "{:.0f}".format)))
    costs = facts.costs()
    tiles.append(("Time", duration(facts.seconds), facts.state))
    if costs:
        joules, usd = sum(cost.joules for cost in costs), sum(cost.usd for cost in costs)
        tiles.append(("Energy", energy(joules), f"{facts.energy_source.split(':')[0]}, {money(usd)}"))
    return Tiles(tiles)


def _tile(
    facts: RunFacts, before: dict[str, Any] | None, last: dict[str, Any], figure: str, show: Callable[[float], str]
) -> tuple[str, str]:
    now = facts.mean(last, figure)
    old = facts.mean(before, figure) if before and before is not last else None
    value = "–" if now is None else show(now)
    if old is None:
        return value, "mean over the reasoning tasks"
    change = f"{show(old).removesuffix('%')} → {value}"
    return change.replace(" ", "\N{NO-BREAK SPACE}"), "before → after RL, mean over the reasoning tasks"


def _reinforcement(facts: RunFacts) -> list[Block]:
    before, after = facts.before_rl, facts.after_rl
    readiness = facts.of("readiness")
    if readiness and not readiness[-1].get("ready", True):
        verdict = readiness[-1]
        text = (
            f"RL was left out: the model was right in {percent(verdict['thinking'])} when made to think and in "
            f"{percent(verdict['direct'])} when made to answer at once, too little for RL to amplify."
        )
        return [Heading("What reinforcement did"), Paragraph(text)]
    if before is None or after is None:
        return []
    greedy = [facts.mean(line, "greedy") for line in (before, after)]
    if greedy[0] is None or greedy[1] is None:
        return []
    measured = Measured(
        greedy_before=greedy[0],
        greedy_after=greedy[1],
        thinking_before=facts.mean(before, "thinking"),
        pass16_before=facts.mean(before, "pass@16"),
    )
    return [Heading("What reinforcement did"), Paragraph(what_rl_did(measured))]


def _accuracy(facts: RunFacts) -> list[Block]:
    before, after = facts.before_rl, facts.after_rl
    last = after or before
    if last is None or not last.get("tasks"):
        return []
    first = before if before is not last else None
    names = [*last["tasks"], None]
    passes = list(dict.fromkeys(name for scores in last["tasks"].values() for name in scores if name[:5] == "pass@"))
    columns = {
        label: cells
        for figure, part, label, kind in [
            FIGURES[0],
            *((name, "tasks", name, "share") for name in passes),
            *FIGURES[1:],
        ]
        if any(cells := [_cell(facts, first, last, name, figure, kind, part) for name in names])
    }
    rows = [[name or "mean", *(cells[place] or "–" for cells in columns.values())] for place, name in enumerate(names)]
    counts = sorted({scores["n"] for scores in last["tasks"].values() if "n" in scores})
    problems = f"{'–'.join(str(count) for count in counts)} problems a task" if counts else "test problems"
    arrow = ", before RL → after RL" if first else ""
    over = "" if facts.reasoning == list(last["tasks"]) else f" Mean over {', '.join(facts.reasoning)}."
    caption = (
        f"Right answers in percent on {problems} that training never saw{arrow}. Greedy: the model chooses whether to "
        "think; thinking, direct: it is made to think first, or to answer at once; "
        f"{', '.join(passes)}{': at temperature 1; ' if passes else ''}"
        f"harder range: lengths that were never trained.{over}"
    )
    return [Table(["task", *columns], rows, caption, total=True)]


def _cell(
    facts: RunFacts,
    first: dict[str, Any] | None,
    last: dict[str, Any],
    task: str | None,
    figure: str,
    kind: str,
    part: str,
) -> str:
    """ "62 → 95", one figure where there is no other, nothing where there is none; `task` None: the mean."""

    def value(line: dict[str, Any] | None) -> str | None:
        if line is None:
            return None
        number = facts.mean(line, figure, part) if task is None else line.get(part, {}).get(task, {}).get(figure)
        return None if number is None else f"{number * 100 if kind == 'share' else number:.0f}"

    found = [text for text in (value(first), value(last)) if text is not None]
    return " → ".join(found)


def _also_measured(facts: RunFacts) -> list[Block]:
    """Figures of the network itself, each from the last evaluation that has it."""
    found: dict[str, Any] = {}
    for line in facts.evaluations:
        found |= {key: value for key, value in line.items() if key in NETWORK_FIGURES}
    lines = []
    if "bits_per_byte" in found:
        lines.append(f"Documents held out of training: {found['bits_per_byte']:.3f} bits a byte")
    if "second_token_acceptance" in found:
        lines.append(
            f"Second token drafted by the prediction module: right in {percent(found['second_token_acceptance'])}"
        )
    if found.get("load_max_mean"):
        loads = ", ".join(f"{load:.2f}" for load in found["load_max_mean"])
        lines.append(f"Busiest expert over the mean, on its own answers, layer by layer: {loads}")
    return [Items(lines)] if lines else []


def _baselines(facts: RunFacts) -> list[Block]:
    if not facts.baselines:
        return []
    names = list(facts.baselines[0]["tasks"])
    rows = []
    for entry in facts.baselines:
        scores = [facts.mean({"tasks": {name: entry["tasks"].get(name, {})}}, "greedy") for name in names]
        mean = facts.mean(entry, "greedy")
        cells = ["–" if score is None else f"{score * 100:.0f}" for score in [*scores, mean]]
        rows.append([entry["name"], duration(entry["seconds"]), f"{entry['steps']}", *cells])
    caption = "The same model trained on in other ways; right greedy answers in percent on the same test problems"
    return [Heading("Beside it"), Table(["way", "time", "steps", *names, "mean"], rows, caption)]


# --- recipe, training, cost, origin -----------------------------------------------------------------------------------


def recipe_in_words(recipe: dict[str, Any]) -> list[str]:
    """A recipe (defaults spelled out) in plain words, one sentence a part."""
    model = ModelConfig.read(recipe["model"], "recipe")
    sources = ", ".join(_source_in_words(source) for source in recipe["sources"])
    lines = [
        _model_in_words(model),
        f"Tokens: byte-level BPE with {recipe['tokenizer']['vocab_size']:,} entries, learned from the same documents.",
        f"Read: {sources}.",
    ]
    if recipe["tasks"]:
        lines.append(f"Tasks: {', '.join(task['name'] for task in recipe['tasks'])}; every answer can be checked.")
    lines += [f"Stage {place}: {_stage_in_words(stage)}." for place, stage in enumerate(recipe["stages"], start=1)]
    lines.append(f"Numbers: {recipe['compute']}, fp32 masters; seed {recipe['seed']}.")
    return lines


def _model_in_words(model: ModelConfig) -> str:
    size = count_parameters(model)
    attention = (
        f"latent attention (latent of {model.kv_lora_rank})" if model.is_mla else f"{model.kv_heads} key/value heads"
    )
    experts = (
        f"{model.n_routed_experts} experts of which {model.num_experts_per_tok} work on each token, "
        f"{model.n_shared_experts} shared"
        if model.n_routed_experts
        else "dense feed-forward"
    )
    return (
        f"Network: {model.num_hidden_layers} layers of width {model.hidden_size}, {attention}, {experts}; "
        f"{quantity(size.total)} parameters, {quantity(size.active)} at work on a token; "
        f"{cache_bytes_per_token(model):,} bytes of cache a token."
    )


def _source_in_words(source: dict[str, Any]) -> str:
    if source["kind"] == "tasks":
        thoughts = f", {percent(source['thoughts'])} of them with a worked thought" if "thoughts" in source else ""
        return f"{source['documents']:,} made-up problems{thoughts}"
    return f"{source['kind']} documents"


def _stage_in_words(stage: dict[str, Any]) -> str:
    optimizer = stage["optimizer"]
    steps = f"{stage['steps']:,} steps"
    match stage["kind"]:
        case "pretrain":
            what = f"pretraining, {steps} of {stage['rows']} x {stage['length']} tokens"
        case "sft":
            what = (
                f"supervised fine-tuning, {steps} on {stage['demonstrations']:,} demonstrations, "
                f"{percent(stage['thoughts'])} of which think before they answer"
            )
        case "distil":
            asked = f"{stage['problems']:,} problems x {stage['samples']} answers"
            what = f"distillation, {steps} on the right ones of {asked} of the model {stage['teacher']}"
        case "rl":
            rollout = stage["rollout"]
            size = f"{rollout['prompts']} problems x {rollout['samples']} answers"
            what = f"reinforcement ({rollout['method']}), {steps} of {size}"
        case other:
            what = f"{other}, {steps}"
    return f"{what}; {optimizer['kind']} at {optimizer['lr']:g}"


def _warnings(facts: RunFacts) -> list[Block]:
    found = facts.warnings()
    if not found:
        return []
    normal = "A policy loss near 0 is normal: it measures the step, not the success; reward and accuracy do that."
    return [Paragraph(f"The RL doctor remarked the following. {normal}"), Items(found)]


def _costs(facts: RunFacts) -> list[Block]:
    costs = facts.costs()
    if not costs:
        return []
    rows = [_cost_cells(cost.kind, [cost]) for cost in costs]
    sums = _cost_cells("stages together", costs)
    caption = (
        f"What it took. Energy by {facts.energy_source}. Cost: electricity at {USD_PER_KWH:.2f} USD/kWh. "
        f"Evaluations between the stages are in the run's {duration(facts.seconds)}, not in this table"
    )
    header = ["stage", "steps", "tokens trained", "time", "computed", "energy", "cost"]
    return [Table(header, [*rows, sums], caption, total=True)]


def _cost_cells(name: str, costs: Sequence[StageCost]) -> list[str]:
    return [
        name,
        f"{sum(cost.steps for cost in costs):,}",
        quantity(sum(cost.tokens for cost in costs)),
        duration(sum(cost.seconds for cost in costs)),
        flops(sum(cost.flops for cost in costs)),
        energy(sum(cost.joules for cost in costs)),
        money(sum(cost.usd for cost in costs)),
    ]


def _origin(facts: RunFacts) -> list[str]:
    lines = []
    for data in facts.of("run")[:1]:
        code, machine = data.get("code", {}), data.get("machine", {})
        git = code.get("git")
        where = f"commit {git['commit']}{', changed since' if git['dirty'] else ''}" if git else "not a checkout"
        lines.append(f"Code: glasklar {code.get('version')}, {where}, files {code.get('files')}")
        lines.append(f"Machine: {machine.get('cpu')}, threads {machine.get('threads')}, torch {machine.get('torch')}")
    for data in facts.of("data")[:1]:
        counts = ", ".join(f"{data[key]:,} {key}" for key in ("documents", "bytes", "tokens") if key in data)
        lines.append(f"Data: {counts}; Merkle root {data.get('root')}")
    lines += [f"Tokenizer: {data.get('hash')}" for data in facts.of("tokenizer")[:1]]
    checkpoints = facts.of("checkpoint")
    if checkpoints:
        lines.append(f"Last of {len(checkpoints)} recorded states: {checkpoints[-1]['state_hash']}")
    if resumed := len(facts.of("resumed")):
        lines.append(f"Interrupted and resumed: {resumed} time{'s' if resumed > 1 else ''}")
    lines += [f"Ended early, {end}" for end in facts.ends()]
    steps, seconds = facts.lost
    if steps:
        lines.append(f"Work lost with it, or done again: {steps} steps, {duration(seconds)}")
    if facts.baselines:
        lines.append(f"Baselines: {BASELINES} in the run folder; they are not part of the ledger")
    if facts.events:
        lines.append(f"Head of the ledger ({len(facts.events)} events): {facts.events[-1].hash}")
    return lines


# --- figures for people -----------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    return f"{share:.0%}"


def quantity(count: float) -> str:
    return _scaled(count, [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")], "")


def flops(count: float) -> str:
    units = [(1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")]
    return _scaled(count, units, "FLOP")


def energy(joules: float) -> str:
    milliwatt_hours = joules / JOULES_PER_KWH * 1e6
    return _scaled(milliwatt_hours, [(1e9, "MWh"), (1e6, "kWh"), (1e3, "Wh")], "mWh")


def money(usd: float) -> str:
    if usd >= 1:
        return f"{usd:,.2f} USD"
    return f"{usd * 100:.2g} US cents" if usd >= 1e-5 else "< 0.001 US cents"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _scaled(value: float, units: Sequence[tuple[float, str]], unit: str) -> str:
    size, name = next(((size, name) for size, name in units if value >= size), (1.0, unit))
    return f"{value / size:.3g} {name}".strip()
