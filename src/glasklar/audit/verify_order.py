"""Whether every line of the ledger and of the metrics stands where a run writes it: what a maker adds, leaves out,
repeats or moves would come into the documents, whose figures are sums over lines."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from glasklar.audit.findings import Findings
from glasklar.distil import stages_taught
from glasklar.learn.state import checkpoint_name
from glasklar.provenance.ledger import Event
from glasklar.provenance.metrics import read_metrics
from glasklar.provenance.rundir import RunDir
from glasklar.recipe import Recipe, RLStage

ONCE = {"run", "data", "tokenizer", "taught", "released", "abandoned"}
KNOWN = ONCE | {"resumed", "checkpoint", "readiness", "evaluation", "stopped", "failed"}
ENDS = {"released", "abandoned"}  # nothing comes after them
Place = tuple[int, int]  # stage, step
START: Place = (-1, 0)


def check_order(run: RunDir, events: list[Event], found: Findings) -> None:
    """A finding about the ledger and one about the metrics. Raises RecipeError where the recipe cannot be read."""
    recipe = Recipe.read(run.recipe(), run.identity_file.name)
    course = Course(recipe)
    wrong = next(
        (f"line {event.index + 1} ({event.event}): {why}" for event in events if (why := course.take(event))), None
    )
    found.expect(
        wrong is None,
        "order of the ledger",
        "every line stands where a run writes it",
        f"{wrong}: no run writes such a line there",
    )
    if wrong is None:
        wrong = _metrics(run, course)
        found.expect(
            wrong is None,
            "order of the metrics",
            "every step and evaluation is there once, in its place, and nothing else",
            f"{wrong}",
        )


class Course:
    """Follows a run through its ledger."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.seen: list[str] = []
        self.at: Place = START
        self.measured: set[int] = set()  # stages with an evaluation
        self.skipped: set[int] = set()  # stages of RL that were left out
        self.between: set[Place] = set()  # checkpoints of who stopped between two that were due

    @property
    def released(self) -> bool:
        return "released" in self.seen

    def take(self, event: Event) -> str | None:
        """What is wrong with a line after those before it; None: nothing."""
        name, before = event.event, self.seen[-1] if self.seen else None
        if name == "repaired" and before is not None:  # a torn last line was taken out, wherever that happened
            return None
        self.seen.append(name)
        try:
            datetime.fromisoformat(event.time)
        except ValueError:
            return f"{event.time!r} is no time"
        if name not in KNOWN:
            return "unknown"
        if (name == "run") != (before is None) or (name in ONCE and self.seen.count(name) > 1):
            return "there is another one" if before is not None else "the first line is that of the run"
        if before in ENDS:
            return f"after {before}"
        if self.at in self.between and before == "checkpoint" and name not in ("stopped", "failed", "resumed"):
            return "a checkpoint that was not due comes before a stop"
        if before in ("stopped", "failed") and name not in ("resumed", "abandoned", "stopped", "failed"):
            return f"the run had {before}"
        if name in ("checkpoint", "readiness", "evaluation", "released") and "data" not in self.seen:
            return "before the data"
        return {
            "resumed": self._resumed,
            "taught": self._taught,
            "checkpoint": self._checkpoint,
            "readiness": self._readiness,
            "evaluation": self._evaluation,
            "released": self._released,
        }.get(name, lambda data: None)(event.data)

    def _resumed(self, data: dict[str, Any]) -> str | None:
        name = data.get("checkpoint")
        place = START if name is None else self._place(name)
        if place is None or place > self.at:
            return f"goes on from {name}, which was not recorded"
        self.at = place
        self.measured = {index for index in self.measured if index < place[0]}
        self.skipped = {index for index in self.skipped if index < place[0]}
        return None

    def _taught(self, data: dict[str, Any]) -> str | None:
        return None if self.seen[-2:-1] == ["tokenizer"] and stages_taught(self.recipe) else "nobody was taught then"

    def _checkpoint(self, data: dict[str, Any]) -> str | None:
        due = self._next()
        if due is None:
            return f"{data['name']} is not what comes next"
        (index, step), kind = due, self.recipe.stages[due[0]].kind
        first = self.at[1] + 1 if self.at[0] == index else 1
        here = next((s for s in range(first, step + 1) if data["name"] == checkpoint_name(index, kind, s)), None)
        if here is None:
            return f"{data['name']} is not what comes next"
        if (data.get("stage"), data.get("step")) != (kind, here):
            return f"stage {data.get('stage')}, step {data.get('step')} are not those of {data['name']}"
        self.at = index, here
        if here < step:
            self.between.add(self.at)
        return None

    def _readiness(self, data: dict[str, Any]) -> str | None:
        following = self.at[0] + 1
        while following in self.skipped:
            following += 1
        if not (self._ended() or self.at == START) or not self._is_rl(following):
            return "no reinforcement comes next"
        if not data.get("ready"):
            self.skipped.add(following)
        return None

    def _evaluation(self, data: dict[str, Any]) -> str | None:
        index = self.at[0]
        if not self._ended() or index in self.measured:
            return "no evaluation belongs there"
        stage = self.recipe.stages[index]
        if (data.get("evaluation"), data.get("step")) != (f"after {stage.kind}", stage.steps):
            return "not the evaluation that belongs there"
        self.measured.add(index)
        return None

    def _released(self, data: dict[str, Any]) -> str | None:
        return None if self._next() is None else "stages are left"

    def _is_rl(self, index: int) -> bool:
        return index < len(self.recipe.stages) and isinstance(self.recipe.stages[index], RLStage)

    def _ended(self) -> bool:
        """Whether the last checkpoint is that of a stage's end."""
        index, step = self.at
        return index >= 0 and step == self.recipe.stages[index].steps

    def _next(self) -> Place | None:
        """Stage and step of the checkpoint that comes next; None after the last one."""
        return next((place for place in self._places() if place > self.at), None)

    def _places(self) -> Iterator[Place]:
        for index, stage in enumerate(self.recipe.stages):
            if index not in self.skipped:
                every = range(stage.checkpoint_every, stage.steps, stage.checkpoint_every)
                yield from ((index, step) for step in (*every, stage.steps))

    def _place(self, name: Any) -> Place | None:
        kinds, places = list(enumerate(self.recipe.stages)), [*self._places(), *self.between]
        return next(
            (p for i, s in kinds for p in places if p[0] == i and checkpoint_name(i, s.kind, p[1]) == name),
            None,
        )

    def lines(self) -> Iterator[tuple[str, int]]:
        """What the metrics of the whole run hold, in order: steps by their stage, evaluations by their name."""
        for index, stage in enumerate(self.recipe.stages):
            if index in self.skipped:
                continue
            for step in range(1, stage.steps + 1):
                yield stage.kind, step
                if isinstance(stage, RLStage) and (step == stage.steps or step % stage.evaluate_every == 0):
                    yield "rl step", step
            if index in self.measured or not self.released:
                yield f"after {stage.kind}", stage.steps


def _metrics(run: RunDir, course: Course) -> str | None:
    """What is wrong with the metrics; None: nothing. Those of an unfinished run end somewhere."""
    wanted = list(course.lines())
    place = 0
    for number, line in enumerate(read_metrics(run.metrics_file), start=1):
        here = (line.get("stage", line.get("evaluation")), line.get("step"))
        # An unfinished run does not tell which of its stages are measured.
        while (
            not course.released and place < len(wanted) and wanted[place] != here and wanted[place][0][:6] == "after "
        ):
            place += 1
        if place == len(wanted) or wanted[place] != here:
            due = " step ".join(map(str, wanted[place])) if place < len(wanted) else "the end"
            return f"line {number} is {here[0]} step {here[1]}, where a run has {due}"
        place += 1
    if course.released and place < len(wanted):
        return f"{' step '.join(map(str, wanted[place]))} is missing"
    return None
