"""Distillation, measured: a small student of `spark` against the same student that has to find out by itself.

    python bench/distil.py --keep DIR          # seeds 0 1 2; prints a table, keeps the figures in docs/lab/distil.json
    python bench/distil.py --keep DIR --seeds 1 --json    # one JSON object an arm and seed on stdout

All arms pretrain alike. Then the student learns
    distil            from the answers that spark had right (the built-in recipe spark-small)
    sft               from as many demonstrations as spark itself began with, three in ten of which think
    sft, then rl      the same, and spark's own stage of reinforcement
    sft, equal rl     the same, with reinforcement for the FLOPs of `distil`, its teacher's answers included
    worked solutions  from as many demonstrations as the teacher was asked, all of them with a right thought:
                      what a perfect teacher would have said
The teacher is made first, once (seed 0), and kept beside the students in --keep. Its own training counts for none of
the arms: whoever has no teacher yet pays for it as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from glasklar.runtime import Runtime, prepare, start

THREADS = prepare()

from glasklar.recipe import load_recipe, recipe_path  # noqa: E402

ARMS = ("distil", "sft", "sft, then rl", "sft, equal rl", "worked solutions")
STEPS = 30  # of spark's own reinforcement


def stage_of(recipe: str, kind: str) -> str:
    """A stage of a built-in recipe, in TOML, to the blank line that ends it."""
    begin = f'[[stages]]\nkind = "{kind}"\n'
    text = recipe_path(recipe).read_text(encoding="utf-8")
    return begin + text.split(begin)[1].split("\n\n")[0] + "\n\n"


def stages_of(arm: str, steps: int) -> str:
    """What an arm does after pretraining, in TOML."""
    if arm == "worked solutions":
        taught = stage_of("spark-small", "distil").splitlines()
        own = ("teacher", "licence", "problems", "samples", "max_tokens", "kind")
        kept = [line for line in taught[1:] if line.split(" ")[0] not in own]
        return "\n".join(["[[stages]]", 'kind = "sft"', "demonstrations = 4000", "thoughts = 1.0", *kept]) + "\n\n"
    # However little the student can do after SFT, reinforcement begins, so that there is something to compare.
    rl = stage_of("spark", "rl").replace("accuracy = 0.8, margin = 0.1", "accuracy = 0.0, margin = 0.0")
    rl = rl.replace(f"steps = {STEPS}\n", f"steps = {steps}\n")
    return stage_of("spark", "sft") + (rl if "rl" in arm else "")


def written(arm: str, steps: int, folder: Path) -> Path:
    student = recipe_path("spark-small").read_text(encoding="utf-8")
    text = student.replace(stage_of("spark-small", "distil"), stages_of(arm, steps))
    path = folder / f"{arm.replace(', ', '-').replace(' ', '-')}-{steps}.toml"
    path.write_text(text.replace('name = "spark-small"', f'name = "{path.stem}"'), encoding="utf-8")
    return path


def trained(recipe: str, seed: int, run: Path, home: Path) -> None:
    """As a person would, in a process of its own; a finished run is taken as it is."""
    if (run / "report.html").is_file():
        return
    command = [sys.executable, "-m", "glasklar.cli", "train", recipe, "--seed", str(seed), "--run", str(run)]
    subprocess.run(command, check=True, env={**os.environ, "GLASKLAR_HOME": str(home)})


def distilled(seed: int, run: Path) -> dict[str, Any]:
    """What a finished run of the recipe says of itself."""
    from glasklar.audit.facts import RunFacts
    from glasklar.provenance.rundir import RunDir

    facts = RunFacts.read(RunDir(run))
    line = facts.before_rl
    assert line is not None
    after = [cost for cost in facts.costs() if cost.kind != "pretrain"]
    flops, seconds = sum(cost.flops for cost in after), sum(cost.seconds for cost in after)
    return row_of("distil", seed, sum(cost.steps for cost in after), line, flops, seconds, facts.reasoning)


def continued(arm: str, steps: int, seed: int, run: Path, runtime: Runtime, home: Path) -> dict[str, Any]:
    """Another arm, from the state in which pretraining left a finished run."""
    from glasklar.corpus import prepare
    from glasklar.learn.state import checkpoint_name, load_state
    from glasklar.measuring import Measuring
    from glasklar.segment import flops_of
    from glasklar.training import Training

    recipe = load_recipe(str(written(arm, steps, home))).replace(seed=seed)
    corpus, training = prepare(recipe, run / "data"), Training(recipe, runtime)
    training.restore(*load_state(run / "checkpoints" / checkpoint_name(0, "pretrain", recipe.stages[0].steps)))
    flops, seconds, done = 0.0, 0.0, 0
    for index, stage in enumerate(recipe.stages[1:], start=1):
        training.enter(index)
        runner, began = training.runner(index, corpus, run / "checkpoints"), time.monotonic()
        for _ in range(stage.steps):
            figures = training.advance(runner, index)
            flops += flops_of(stage, recipe.model, figures["tokens"], figures.get("sampled_tokens", 0))
        seconds, done = seconds + time.monotonic() - began, done + stage.steps
    line = Measuring(recipe, corpus).after(training.model, len(recipe.stages) - 1)
    return row_of(arm, seed, done, line, flops, seconds, list(recipe.reasoning_tasks))


def row_of(
    arm: str, seed: int, steps: int, line: dict[str, Any], flops: float, seconds: float, reasoning: list[str]
) -> dict[str, Any]:
    hard = fmean(line["hard"][name]["greedy"] for name in reasoning if name in line["hard"])
    row = {"arm": arm, "seed": seed, "steps": steps, **line["mean"], "hard": hard, "flops": flops, "seconds": seconds}
    return row | {"tasks": line["tasks"]}


def equal_steps(rows: list[dict[str, Any]]) -> int:
    """Steps of reinforcement that use up what distillation took beyond fine-tuning."""
    distil, sft, rl = (fmean(row["flops"] for row in rows if row["arm"] == arm) for arm in ARMS[:3])
    return max(1, round((distil - sft) / (rl - sft) * STEPS))


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "then",
        "greedy",
        "pass@1",
        "pass@16",
        "hard",
        "thinks, tokens",
        "GFLOP",
        "seconds",
        title="spark-small, means over seeds",
    )
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm]
        shares = [fmean(row[name] for row in own) for name in ("greedy", "pass@1", "pass@16", "hard")]
        spread = [row["greedy"] for row in own]
        cells = [f"{shares[0]:.1%} ({min(spread):.1%} to {max(spread):.1%})", *(f"{share:.1%}" for share in shares[1:])]
        table.add_row(
            f"{arm}, {own[0]['steps']} steps", *cells, f"{fmean(row['length'] for row in own):.0f}",
            f"{fmean(row['flops'] for row in own) / 1e9:,.0f}", f"{fmean(row['seconds'] for row in own):.0f}",
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--json", action="store_true", help="rows on stdout instead of the table")
    args = parser.parse_args()
    home: Path = args.keep
    home.mkdir(parents=True, exist_ok=True)
    runtime = start(THREADS)
    trained("spark", 0, home / "runs" / "spark", home)
    runs = [home / "runs" / f"student-{seed}" for seed in range(args.seeds)]
    rows: list[dict[str, Any]] = []
    for arm in ARMS:
        steps = equal_steps(rows) if "equal" in arm else STEPS
        for seed, run in enumerate(runs):
            if arm == "distil":
                trained("spark-small", seed, run, home)
                rows.append(distilled(seed, run))
            else:
                rows.append(continued(arm, steps, seed, run, runtime, home))
            print(json.dumps(rows[-1]), flush=True, file=sys.stdout if args.json else sys.stderr)
    kept = Path(__file__).parents[1] / "docs" / "lab" / "distil.json"
    kept.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if not args.json:
        Console(width=120).print(table_of(rows))


if __name__ == "__main__":
    main()
