"""What people read of a run, held against its record: figures, documents and reports are computed from it again."""

from __future__ import annotations

from glasklar.audit.documents import documents
from glasklar.audit.facts import BASELINES, RunFacts
from glasklar.audit.findings import Findings
from glasklar.audit.report import report_files
from glasklar.audit.seal import sealed_files
from glasklar.audit.verify_replays import checkpoint_events
from glasklar.corpus import REMOVED, TRAIN
from glasklar.data.tokenizer import Tokenizer
from glasklar.distil import part_name, stages_taught, traces_name
from glasklar.provenance.energy import JOULES_PER_KWH
from glasklar.provenance.environment import files_hash, installed_versions
from glasklar.provenance.ledger import Event, exact
from glasklar.provenance.metrics import read_metrics
from glasklar.provenance.rundir import ATTESTATION, RunDir
from glasklar.recipe import Recipe
from glasklar.segment import flops_of

# What a run consists of: files and folders at its top.
PARTS = {
    "recipe.toml", "recipe.json", "ledger.jsonl", "metrics.jsonl", "report.md", "report.html", BASELINES,
    "checkpoints", "model", "data", "dossier",
}  # fmt: skip
CHECKPOINT = {"state.safetensors", "meta.json"}
ROUNDING = 1e-9  # of sums of floats


def check_documents(run: RunDir, events: list[Event], found: Findings) -> None:
    found.guard("figures", lambda: _figures(run, events, found))
    found.guard("documents", lambda: _documents(run, events, found))
    found.guard("parts", lambda: _parts(run, events, found))


def _figures(run: RunDir, events: list[Event], found: Findings) -> None:
    """Loss, gradient norm, FLOPs and price of every recorded segment follow from the figures of its steps."""
    recipe = Recipe.read(run.recipe(), run.identity_file.name)
    lines = read_metrics(run.metrics_file)
    wrong, begin, tokens = [], 0, 0
    recorded = checkpoint_events(events)
    for name, data in recorded.items():
        end = data["metrics"]["lines"]
        steps = [line for line in lines[begin:end] if "stage" in line]
        begin = end
        stage = recipe.stages[int(name[:2])]
        flops = 0.0
        for step in steps:
            flops += flops_of(stage, recipe.model, step["tokens"] - tokens, step.get("sampled_tokens", 0))
            tokens = step["tokens"]
        cost, joules = data["cost"], data["energy"]["joules"]
        claims = {
            "loss": data["loss"] == exact(steps[-1].get("loss", 0.0)),
            "gradient norm": data["gradient_norm"] == exact(steps[-1].get("gradient_norm", 0.0)),
            "FLOP": _near(data["flops"], flops),
            "cost": _near(cost["usd"], joules / JOULES_PER_KWH * cost["usd_per_kwh"]),
        }
        wrong += [f"{claim} of {name}" for claim, true in claims.items() if not true]
    found.expect(
        not wrong,
        "figures",
        f"loss, gradient norm, FLOP and cost of all {len(recorded)} segments follow from the figures of their steps",
        f"{', '.join(wrong)}: the ledger says otherwise than the figures of the steps",
    )


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= ROUNDING * max(abs(a), abs(b))


def _documents(run: RunDir, events: list[Event], found: Findings) -> None:
    """Dossier, card and report must be the ones that the record gives."""
    facts = RunFacts.read(run)
    made = next(event.data for event in events if event.event == "run")
    here = {"code": files_hash(), "matplotlib": installed_versions("matplotlib").get("matplotlib")}
    there = {"code": made["code"]["files"], "matplotlib": made["packages"].get("matplotlib")}
    wanted = {**report_files(facts), **documents(facts)} if facts.of("released") else {}
    lying = {name: run.path / name for name in wanted}
    other = [name for name, path in lying.items() if not path.is_file() or path.read_bytes() != wanted[name]]
    if not wanted:
        return
    if not any(path.exists() for path in lying.values()):
        found.fails(
            "documents",
            f"none of the {len(wanted)} is there: the run was cut off after its release, or they were taken out; "
            f"`glasklar train {run.recipe_file} --run {run.path}` makes them",
        )
        return
    if other and there != here:
        found.unchecked(
            "documents",
            f"{len(other)} of {len(wanted)} are worded or drawn otherwise than here ({other[0]}, …); whether they say "
            "what the record says can be told with the code of that commit and its packages",
        )
        return
    for name in other:
        gone = not lying[name].exists()
        found.fails(
            name,
            "is missing, though the record gives it"
            if gone
            else "is not the document that the record gives: made by hand, or from another record",
        )
    if not other:
        found.holds("documents", f"all {len(wanted)} are, to the byte, those that follow from the record")


def _parts(run: RunDir, events: list[Event], found: Findings) -> None:
    """Nothing lies in the folder that is no part of a run. Signed or not, code beside weights is not harmless."""
    released = [event.data["files"] for event in events if event.event == "released"]
    data = next((event.data for event in events if event.event == "data"), None)
    taught = [index for index, _ in stages_taught(Recipe.read(run.recipe(), run.identity_file.name))]
    traces = {part_name(index) for index in taught} if data is None else set()  # its teacher is still answering
    traces |= {traces_name(index) for index in taught}
    tokenizer = Tokenizer.load(run.data).files() if _has_tokenizer(run) else ()
    inside = {
        "model": {*released[-1], "README.md", ATTESTATION} if released else set(),
        "data": {"facts.json", TRAIN, REMOVED, *traces, *tokenizer},
        "dossier": {name.removeprefix("dossier/") for name in documents(RunFacts.read(run))},
    }
    top = PARTS if released else PARTS - {"report.md", "report.html"}
    strange = []
    for path in sealed_files(run.path):
        parts = path.relative_to(run.path).parts
        known = parts[0] in top
        if parts[0] in inside:
            known = len(parts) == 2 and parts[1] in inside[parts[0]]
        elif parts[0] == "checkpoints":
            known = len(parts) == 3 and parts[2] in CHECKPOINT
        if not known:
            strange.append("/".join(parts))
    empty = (path for path in sorted(run.path.rglob("*")) if path.is_dir() and not any(path.iterdir()))
    strange += [f"{path.relative_to(run.path).as_posix()}/" for path in empty if path != run.checkpoints]
    for name in strange:
        found.fails(name, "is no part of a run: the ledger knows nothing of it, though its signer may have signed it")
    if not strange:
        found.holds("parts", "nothing lies in the folder that is no part of a run")
    if (run.path / BASELINES).is_file():
        found.unchecked(
            BASELINES, "figures from elsewhere that the report shows beside; the ledger knows nothing of them"
        )


def _has_tokenizer(run: RunDir) -> bool:
    return (run.data / "tokenizer.json").is_file()
