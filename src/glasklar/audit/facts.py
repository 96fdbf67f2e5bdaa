"""What a run's own record says, read for a report: the ledger (chain verified), the metrics, the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, Self

from glasklar.errors import CheckpointError
from glasklar.provenance.energy import JOULES_PER_KWH, USD_PER_KWH
from glasklar.provenance.hashing import canonical_json, sha256_hex
from glasklar.provenance.ledger import Event, read_ledger
from glasklar.provenance.metrics import read_metrics
from glasklar.provenance.rundir import RunDir

BASELINES = "baselines.json"


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What a kind of stage took over all its checkpointed segments, those done twice after an interruption included."""

    kind: str
    steps: int
    tokens: int
    seconds: float
    flops: float
    joules: float

    @property
    def usd(self) -> float:
        return self.joules / JOULES_PER_KWH * USD_PER_KWH


@dataclass(frozen=True, kw_only=True, eq=False)
class RunFacts:
    """steps: metrics lines of training steps; evaluations: those of evaluations; both in the order of the run. Two
    records that say the same are equal, so that what is drawn from one can be kept."""

    recipe: dict[str, Any]
    events: list[Event]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    baselines: list[dict[str, Any]]

    @classmethod
    def read(cls, run: RunDir) -> Self:
        """Raises CheckpointError where this is no run folder or its ledger does not hold."""
        events, _ = read_ledger(run.ledger_file)
        lines = read_metrics(run.metrics_file)
        return cls(
            recipe=run.recipe(),
            events=events,
            steps=[line for line in lines if "stage" in line],
            evaluations=[line for line in lines if "evaluation" in line],
            baselines=_read_baselines(run),
        )

    @cached_property
    def digest(self) -> str:
        events = [event.hash for event in self.events]
        return sha256_hex(canonical_json([self.recipe, events, self.steps, self.evaluations, self.baselines]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunFacts) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def of(self, name: str) -> list[dict[str, Any]]:
        return [event.data for event in self.events if event.event == name]

    @property
    def state(self) -> str:
        if self.of("released"):
            return "finished, model released"
        ends = {"failed": "failed", "stopped": "stopped by its owner", "abandoned": "abandoned"}
        return ends.get(self.events[-1].event, "unfinished") if self.events else "unfinished"

    @property
    def lost(self) -> tuple[int, float]:
        """Steps and seconds of work that no checkpoint holds: done again after an interruption, or not at all."""
        gaps = [data["lost"] for data in self.of("resumed") if "lost" in data]
        last = self.events[-1].data.get("lost") if self.events else None
        gaps += [last] if last is not None and self.events[-1].event != "resumed" else []
        return sum(gap["steps"] for gap in gaps), sum(gap["seconds"] for gap in gaps)

    def ends(self) -> list[str]:
        """How the run ended early, each time, in a sentence."""
        said = {
            "failed": lambda data: f"failed: {data['error']}",
            "stopped": lambda data: "stopped by its owner",
            "abandoned": lambda data: f"abandoned: {data['reason']}",
        }
        return [f"{event.time}: {said[event.event](event.data)}" for event in self.events if event.event in said]

    @property
    def seconds(self) -> float:
        """Wall clock up to the last recorded step or evaluation, pauses aside."""
        return max((line.get("seconds", 0.0) for line in [*self.steps, *self.evaluations]), default=0.0)

    @property
    def reasoning(self) -> list[str]:
        """Names of the tasks that count in the mean."""
        return [task["name"] for task in self.recipe["tasks"] if task.get("reason", True)]

    def stage(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.steps if line["stage"] == kind]

    @property
    def after_rl(self) -> dict[str, Any] | None:
        """The last evaluation after RL, if RL took place."""
        return next((line for line in reversed(self.evaluations) if line["evaluation"] == "after rl"), None)

    @property
    def before_rl(self) -> dict[str, Any] | None:
        """The last evaluation of the tasks before RL; without RL the last one of all."""
        found = None
        for line in self.evaluations:
            if line["evaluation"] in ("after rl", "rl step"):
                break
            found = line if line.get("tasks") else found
        return found

    @property
    def bits_per_byte(self) -> float | None:
        """Of the last evaluation on documents kept from training; None without one."""
        return next((line["bits_per_byte"] for line in reversed(self.evaluations) if "bits_per_byte" in line), None)

    @property
    def watched(self) -> list[dict[str, Any]]:
        """Evaluations while RL ran, on validation problems."""
        return [line for line in self.evaluations if line["evaluation"] == "rl step"]

    def mean(self, line: dict[str, Any], figure: str, part: str = "tasks") -> float | None:
        """Mean of a figure over the reasoning tasks that an evaluation has it for; None where it has none."""
        tasks = line.get(part, {})
        names = [name for name in tasks if name in self.reasoning] or list(tasks)
        values = [tasks[name][figure] for name in names if tasks[name].get(figure) is not None]
        return fmean(values) if values else None

    def costs(self) -> list[StageCost]:
        """One entry a kind of stage, in the order of the run; what teachers took comes first, as "teacher"."""
        segments = self.of("checkpoint")
        kinds = unique(segment["stage"] for segment in segments)
        taught = [
            StageCost(
                kind="teacher",
                steps=0,
                tokens=0,
                seconds=data["seconds"],
                flops=sum(traces["flops"] for traces in self.of("data")[0].get("traces", {}).values()),
                joules=data["energy"]["joules"],
            )
            for data in self.of("taught")
        ]
        return taught + [
            self._cost(kind, [segment for segment in segments if segment["stage"] == kind]) for kind in kinds
        ]

    def _cost(self, kind: str, segments: Sequence[dict[str, Any]]) -> StageCost:
        tokens, before = 0, 0
        for line in self.steps:
            tokens += line["tokens"] - before if line["stage"] == kind else 0
            before = line["tokens"]
        return StageCost(
            kind=kind,
            steps=len(self.stage(kind)),
            tokens=tokens,
            seconds=sum(segment["seconds"] for segment in segments),
            flops=sum(segment["flops"] for segment in segments),
            joules=sum(segment["energy"]["joules"] for segment in segments),
        )

    @property
    def energy_source(self) -> str:
        """Every source that measured a segment, with its boundary."""
        records = [segment["energy"] for name in ("taught", "checkpoint") for segment in self.of(name)]
        return "; ".join(unique(f"{record['source']}: {record['boundary']}" for record in records))

    def warnings(self) -> list[str]:
        """The doctor's warnings, each once, with the steps that it was given for."""
        seen: dict[str, list[str]] = {}
        for line in self.steps:
            for text in line.get("warnings", ()):
                seen.setdefault(text, []).append(f"{line['stage']} step {line['step']}")
        return [f"{text} ({_span(places)})" for text, places in seen.items()]


def running_steps(lines: Sequence[dict[str, Any]]) -> list[int]:
    """Steps of lines of one kind of stage, counted on where a recipe has that kind of stage more than once."""
    counted: list[int] = []
    offset = previous = 0
    for line in lines:
        if line["step"] < previous:
            offset += previous
        previous = line["step"]
        counted.append(offset + previous)
    return counted


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _span(places: Sequence[str]) -> str:
    return places[0] if len(places) == 1 else f"{len(places)} times, from {places[0]} to {places[-1]}"


def _read_baselines(run: RunDir) -> list[dict[str, Any]]:
    """[{"name": …, "seconds": …, "steps": …, "tasks": {…}}, …] where a bench put it there; none otherwise."""
    path = run.path / BASELINES
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); remove it or have it made again") from None
