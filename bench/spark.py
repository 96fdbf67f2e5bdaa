"""The main job, measured: `spark` from nothing under several seeds, and what else the time of RL could have bought.

    python bench/spark.py                      # seeds 0 1 2; prints a table, keeps the figures in docs/lab/spark.json
    python bench/spark.py --seeds 5 --json     # one JSON object a seed on stdout

From the model that SFT left, each baseline gets the wall clock of RL: more SFT on the same finite demonstrations,
SFT on unlimited demonstrations (an oracle: somebody who writes worked thoughts for ever), and rejection sampling
(likelihood of the model's own right answers).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from glasklar.runtime import Runtime, prepare, start

ENDLESS = 1 << 20
BASELINES = ("more SFT, same demonstrations", "SFT, unlimited demonstrations", "rejection sampling")
GOAL_MINUTES, GOAL_SEED, GOAL_MEAN, GOAL_GAIN = 10, 0.88, 0.92, 0.20


def train(recipe: str, seed: int, folder: Path) -> float:
    """Runs the recipe in a process of its own, as a person would, or takes the run that is there already; returns
    seconds from the folder's first file to the release of the model."""
    command = [sys.executable, "-m", "glasklar.cli", "train", recipe, "--seed", str(seed), "--run", str(folder)]
    if not (folder / "report.html").is_file():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    *_, last = (json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines())
    assert last["event"] == "released"
    return datetime.fromisoformat(last["time"]).timestamp() - (folder / "recipe.json").stat().st_mtime


def measure(recipe_name: str, seed: int, folder: Path, runtime: Runtime) -> dict[str, Any]:
    """One seed: the run's own evaluations, its RL curve, and the baselines."""
    from glasklar.audit.documents import write_documents
    from glasklar.audit.report import write_report
    from glasklar.audit.seal import seal
    from glasklar.provenance.metrics import read_metrics
    from glasklar.provenance.rundir import RunDir, home
    from glasklar.provenance.signing import Signer
    from glasklar.recipe import load_recipe

    recipe = load_recipe(recipe_name).replace(seed=seed)
    seconds = train(recipe_name, seed, folder)
    lines = read_metrics(folder / "metrics.jsonl")
    evaluations = {line["evaluation"]: line for line in lines if line.get("evaluation", "").startswith("after")}
    rl = [line for line in lines if line.get("stage") == "rl"]
    if not rl:
        raise SystemExit(f"seed {seed}: RL was left out, the model was not ready; see {folder / 'report.md'}")
    spent = rl[-1]["seconds"] - evaluations["after sft"]["seconds"]
    kept = folder / "baselines.json"
    if not kept.is_file():
        rows = [{"name": name, **continue_for(spent, name, recipe, folder, runtime)} for name in BASELINES]
        kept.write_text(json.dumps(rows, indent=1))
        run = RunDir(folder)  # its report shows them, so it is written and signed again
        write_report(run)
        write_documents(run)
        seal(run, Signer.open(home(os.environ)))
    baselines = {row["name"]: row for row in json.loads(kept.read_text())}
    return {
        "seed": seed,
        "seconds": seconds,
        "rl_seconds": spent,
        "before": evaluations["after sft"],
        "after": evaluations["after rl"],
        "baselines": baselines,
        "curve": [{key: line[key] for key in ("step", "correct", "thinking_share", "length")} for line in rl],
        "watched": [(line["step"], line["mean"]["greedy"]) for line in lines if line.get("evaluation") == "rl step"],
    }


def continue_for(seconds: float, name: str, recipe: Any, folder: Path, runtime: Runtime) -> dict[str, Any]:
    """Trains on from the end of SFT for so many seconds in another way; returns accuracy on the test problems."""
    from glasklar.corpus import EVALUATION_SEED, demonstration_tokens
    from glasklar.corpus import prepare as prepare_corpus
    from glasklar.data.batches import PackedDocuments, Packer
    from glasklar.data.procedural import Mixture
    from glasklar.engine.engine import Engine
    from glasklar.eval.tasks import evaluate_tasks, table
    from glasklar.learn.optim import make_optimizer
    from glasklar.pipeline import state_after
    from glasklar.recipe import RLStage, SFTStage
    from glasklar.stages import LanguageRunner, PolicyRunner, Runner

    corpus = prepare_corpus(recipe, folder / "data")
    index, sft = next((i, s) for i, s in enumerate(recipe.stages) if isinstance(s, SFTStage))
    rl = next(s for s in recipe.stages if isinstance(s, RLStage))
    model = state_after(recipe, folder, index, runtime)
    runner: Runner
    if name == "rejection sampling":
        stage = rl.replace(rollout=rl.rollout.replace(method="rejection"))
        engine, mixture = Engine(model), Mixture.of(recipe.tasks)
        optimizer = make_optimizer(model, stage.optimizer)
        runner = PolicyRunner(stage, model, optimizer, engine, corpus.tokenizer, mixture, 99, None)
    else:
        more = sft.replace(schedule=sft.schedule.replace(shape="constant"), steps=ENDLESS)
        count = sft.demonstrations if name.startswith("more") else 20 * sft.demonstrations
        tokens = demonstration_tokens(recipe, more.replace(demonstrations=count), corpus.tokenizer)
        packer = Packer(PackedDocuments.of(list(tokens)), rows=more.rows, length=more.length, seed=99)
        runner = LanguageRunner(more, model, make_optimizer(model, more.optimizer), packer, runtime.device)
    steps = run_for(seconds, runner.step)
    settings = recipe.evaluation
    scores = evaluate_tasks(
        Engine(model),
        corpus.tokenizer,
        Mixture.of(recipe.tasks),
        split="test",
        seed=EVALUATION_SEED,
        problems=settings.problems,
        max_tokens=settings.max_tokens,
        samples=settings.samples,
        sampled_problems=settings.sampled_problems,
    )
    return {"seconds": seconds, "steps": steps, **table(scores, recipe.reasoning_tasks)}


def run_for(seconds: float, step: Callable[[int], Any]) -> int:
    """Steps until the time is over; returns how many."""
    end = time.monotonic() + seconds
    k = 0
    while time.monotonic() < end:
        step(k)
        k += 1
    return k


def render(results: list[dict[str, Any]]) -> Table:
    out = Table("", *(f"seed {r['seed']}" for r in results), "mean", "wanted", title="spark on two cores")

    def row(name: str, values: list[float], form: Callable[[float], str], wanted: str = "") -> None:
        out.add_row(name, *map(form, values), form(fmean(values)), wanted)

    def share(value: float) -> str:
        return f"{value:.1%}"

    minutes = [r["seconds"] / 60 for r in results]
    row("minutes, nothing to released model", minutes, lambda v: f"{v:.1f}", f"<= {GOAL_MINUTES}")
    for label in ("greedy", "thinking", "direct", "pass@1", "pass@16"):
        row(f"before RL: {label}", [r["before"]["mean"][label] for r in results], share)
    wanted = f">= {GOAL_SEED:.0%} each, {GOAL_MEAN:.0%} mean"
    row("after RL: greedy", [r["after"]["mean"]["greedy"] for r in results], share, wanted)
    for label in ("pass@1", "pass@16"):
        row(f"after RL: {label}", [r["after"]["mean"][label] for r in results], share)
    gains = [r["after"]["mean"]["greedy"] - r["before"]["mean"]["greedy"] for r in results]
    row("gain by RL", gains, share, f">= {GOAL_GAIN:.0%} each")
    row("tokens an answer, before", [r["before"]["mean"]["length"] for r in results], lambda v: f"{v:.1f}")
    row("tokens an answer, after", [r["after"]["mean"]["length"] for r in results], lambda v: f"{v:.1f}", "longer")
    for task in results[0]["after"]["hard"]:
        row(f"harder {task}, before", [r["before"]["hard"][task]["greedy"] for r in results], share)
        row(f"harder {task}, after", [r["after"]["hard"][task]["greedy"] for r in results], share)
    for name in results[0]["baselines"]:
        row(f"equal time: {name}", [r["baselines"][name]["mean"]["greedy"] for r in results], share)
    row("second token accepted", [r["after"]["second_token_acceptance"] for r in results], share, "> 60 %")
    loads = [max(r["after"]["load_max_mean"]) for r in results]
    row("expert load max/mean, worst layer", loads, lambda v: f"{v:.2f}", "< 1.5")
    return out


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Accuracy on unseen problems, length and share of thoughts while RL runs; one line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.1), layout="constrained")
    for k, result in enumerate(results):
        colour, label = f"C{k}", f"seed {result['seed']}"
        watched = [(0, result["before"]["mean"]["greedy"]), *result["watched"]]
        axes[0].plot(*zip(*watched, strict=True), color=colour, marker="o", markersize=3, label=label)
        steps = [line["step"] for line in result["curve"]]
        axes[1].plot(steps, [line["thinking_share"] for line in result["curve"]], color=colour)
        axes[2].plot(steps, [line["length"] for line in result["curve"]], color=colour)
    titles = ("right on unseen problems", "answers that think first", "tokens an answer")
    for one, title in zip(axes, titles, strict=True):
        one.set(title=title, xlabel="steps of reinforcement", ylim=(0, None if one is axes[2] else 1.03))
        one.grid(alpha=0.25)
    for one in axes[:2]:
        one.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes[0].legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="spark")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-spark"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/lab/spark.json"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    runtime = start(prepare())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in arguments.seeds:
        results.append(measure(arguments.recipe, seed, arguments.runs / f"seed-{seed}", runtime))
        if arguments.json:
            print(json.dumps(results[-1]), flush=True)
        arguments.out.write_text(json.dumps(results, indent=1))
    plot(results, arguments.out.with_suffix(".png"))
    if not arguments.json:
        Console(width=140).print(render(results))


if __name__ == "__main__":
    main()
