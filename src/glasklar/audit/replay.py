"""`glasklar replay`: parts of a run's training done again, each recorded state compared bit for bit.

A segment is what lies between two recorded states. Runs keep the newest states and the end of every stage, so a replay
begins at the nearest earlier state that is there (or at the seed: the first weights follow from it) and compares every
recorded state that it passes, kept or not. From one kept state to the next is a *stretch*, the unit that `--all` and
the random draw work on; a recipe with a checkpoint kept at every step would have stretches of one segment.

Bit equality is promised on the same class of machine: processor features, threads, device, versions, ops. Elsewhere a
state may differ by rounding; `tolerance` then compares losses, and is called what it is: no proof.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from glasklar.audit.findings import Findings
from glasklar.audit.verify_contents import unknown_form
from glasklar.audit.verify_replays import REPLAY_KIND, checkpoint_events, coverage, read_replays
from glasklar.corpus import Corpus, prepare
from glasklar.distil import Teachers
from glasklar.errors import CheckpointError, RecordError, RequestError
from glasklar.learn.state import checkpoint_name, load_state, state_hash
from glasklar.measuring import Measuring
from glasklar.provenance.environment import code_identity
from glasklar.provenance.files import write_atomic
from glasklar.provenance.hashing import canonical_json, sha256_hex
from glasklar.provenance.ledger import Event, exact, read_ledger
from glasklar.provenance.metrics import read_metrics
from glasklar.provenance.rundir import RunDir
from glasklar.provenance.signing import Signer
from glasklar.recipe import Recipe, RLStage
from glasklar.runtime import Runtime
from glasklar.training import Training

Progress = Callable[[str, int, int], None]

# What changes the bits of a result; the rest of `describe_machine` is for people.
MACHINE_CLASS = ("device", "compute", "threads", "cpu", "cpu_capability", "gpu", "torch", "ops", "passes")


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """From a kept state (None: from the seed) through the recorded states `names`, in order."""

    start: str | None
    names: list[str]


@dataclass(frozen=True, kw_only=True)
class StepDifference:
    """The first step whose figures are not the recorded ones."""

    place: str
    figure: str
    recorded: Any
    here: Any

    def __str__(self) -> str:
        recorded, here = (exact(v) if isinstance(v, float) else v for v in (self.recorded, self.here))
        return f"{self.place}: {self.figure} is {here}, recorded was {recorded}"


class Record:
    """What a run says of its training, its ledger verified: all that a replay compares with."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.events, _ = read_ledger(run.ledger_file)
        if wrong := unknown_form(self.events):
            raise RecordError(f"{run.ledger_file}: {wrong}; replay it with the code that made it")
        self.recipe = Recipe.read(run.recipe(), run.identity_file.name)
        begun = self._of("run")
        if not begun or begun[0]["recipe"] != self.recipe.hash:
            raise RecordError(f"{run.identity_file}: not the recipe that the ledger begins with; see `glasklar verify`")
        self.machine = [*begun, *self._of("resumed")][-1]["machine"]
        self.code = begun[0]["code"]
        self.states = {name: data["state_hash"] for name, data in checkpoint_events(self.events).items()}
        for name in self.states:
            index, step = int(name[:2]), int(name[-8:])
            stages = self.recipe.stages
            if (
                index >= len(stages)
                or step > stages[index].steps
                or name != checkpoint_name(index, stages[index].kind, step)
            ):
                raise RecordError(
                    f"{run.ledger_file}: checkpoint {name!r} is none of this recipe; see `glasklar verify`"
                )
        if not self.states:
            raise RecordError(f"{run.path}: no state is recorded yet, so there is nothing to replay")
        self.steps = [line for line in read_metrics(run.metrics_file) if "stage" in line]
        self.data = self._of("data")[0]

    def _of(self, name: str) -> list[dict[str, Any]]:
        return [event.data for event in self.events if event.event == name]

    @property
    def head(self) -> Event:
        return self.events[-1]

    def kept(self, name: str) -> bool:
        return (self.run.checkpoints / name / "meta.json").is_file()

    def trained(self, index: int) -> bool:
        """Whether a stage took place (reinforcement is left out where the model is not ready)."""
        return any(name.startswith(f"{index:02d}-") for name in self.states)

    def line(self, index: int, step: int) -> dict[str, Any] | None:
        """Recorded figures of a step (from 1) of a stage; None where the metrics end before."""
        place = sum(self.recipe.stages[i].steps for i in range(index) if self.trained(i)) + step - 1
        return self.steps[place] if place < len(self.steps) else None

    def place(self, name: str | None) -> int:
        """Steps of the run up to a recorded state; None: none."""
        if name is None:
            return 0
        index, step = int(name[:2]), int(name.rpartition("-")[2])
        return sum(self.recipe.stages[i].steps for i in range(index) if self.trained(i)) + step

    def steps_of(self, stretch: Stretch) -> int:
        return self.place(stretch.names[-1]) - self.place(stretch.start)

    def watched(self, index: int, step: int) -> list[dict[str, Any]]:
        """Recorded evaluations while a stage ran, after one of its steps."""
        lines, trained, found = read_metrics(self.run.metrics_file), -1, []
        for line in lines:
            if "stage" in line:
                trained += line["step"] == 1
            elif line["evaluation"] == "rl step" and line["step"] == step and self._stages()[trained] == index:
                found.append(line)
        return found

    def _stages(self) -> list[int]:
        """Numbers of the stages that took place, in order."""
        return [index for index in range(len(self.recipe.stages)) if self.trained(index)]

    def evaluations(self, index: int) -> list[dict[str, Any]]:
        """All that the ledger says was measured after a stage; more than once where the run was interrupted then."""
        return [data for at, data in self._placed("evaluation") if at == index]

    def readiness(self, index: int) -> list[dict[str, Any]]:
        """What decided whether reinforcement, stage `index`, could begin."""
        found = [data for at, data in self._placed("readiness") if at == index - 1]
        return [{"evaluation": "readiness", "step": 0, **data} for data in found]

    def _placed(self, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Events of a kind, each with the stage whose checkpoint came last before it."""
        at = -1
        for event in self.events:
            if event.event == "checkpoint":
                at = int(event.data["name"][:2])
            elif event.event == name:
                yield at, event.data

    def stretches(self) -> list[Stretch]:
        """The whole training, cut at the kept states."""
        found: list[Stretch] = []
        start, names = None, []
        for name in self.states:
            names.append(name)
            if self.kept(name):
                found.append(Stretch(start=start, names=names))
                start, names = name, []
        return [*found, Stretch(start=start, names=names)] if names else found

    def leading_to(self, segment: str) -> Stretch:
        """The stretch up to a segment, named by its number (from 1) or by the state that ends it.

        Raises RequestError for one that the run does not have.
        """
        names = list(self.states)
        name = names[int(segment) - 1] if segment.isdecimal() and 0 < int(segment) <= len(names) else segment
        if name not in self.states:
            raise RequestError(f"segment {segment!r}: this run has 1 to {len(names)}, which end in {', '.join(names)}")
        whole = next(stretch for stretch in self.stretches() if name in stretch.names)
        return Stretch(start=whole.start, names=whole.names[: whole.names.index(name) + 1])


def draw(record: Record, beacon: str, count: int) -> list[Stretch]:
    """`count` stretches by public randomness: who fixed the ledger's head before `beacon` was known could not choose.

    beacon   a value that became public after the head was: a drand round, a lottery draw, a block hash

    The third of them (at least one) with the largest change of weights a step are always taken: whoever patches
    weights in has to move them there.
    """
    if not beacon.strip() or count < 1:
        raise RequestError(f"beacon = {beacon!r}, n = {count}: a public value and at least one stretch are needed")
    stretches = record.stretches()
    largest = sorted(stretches, key=lambda stretch: -_speed(record, stretch))[: -(-count // 3)]
    others = [stretch for stretch in stretches if stretch not in largest]
    others.sort(key=lambda s: sha256_hex(f"{beacon}\n{record.head.hash}\n{s.names[-1]}".encode()))
    chosen = [*largest, *others[: max(0, count - len(largest))]]
    return [stretch for stretch in stretches if stretch in chosen]


def replay(
    run: RunDir,
    choose: Callable[[Record], Sequence[Stretch]],
    *,
    runtime: Runtime,
    home: Path | None = None,
    signer: Signer | None = None,
    rebuild_data: bool = False,
    tolerance: float | None = None,
    progress: Progress = lambda text, done, total: None,
) -> Findings:
    """Does the chosen stretches again.

    choose         e.g. `Record.stretches`, or `lambda record: [record.leading_to("3")]`
    home           where teachers are looked up whose answers have to be made again
    signer         signs what came out equal into the run's coverage table; None: nothing is written
    rebuild_data   make the training data from their sources again instead of reading what lies in the folder
    tolerance      where the machine is of another class: largest relative difference of a loss that is let pass
    progress       is told what is replayed, and steps done of all that were chosen

    Raises RecordError or CheckpointError where the record cannot be read, DataError where a source is gone.
    """
    record = Record(run)
    found = Findings(str(run.path), "replay")
    equal: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        rebuild = rebuild_data or not run.data.is_dir()
        teachers = Teachers(home=home, runtime=runtime, tell=progress) if home is not None else None
        corpus = prepare(record.recipe, Path(scratch) / "data" if rebuild else run.data, teachers=teachers)
        how = "made again from their sources, " if rebuild else ""
        good = f"{how}{record.data['tokens']:,} tokens, Merkle root {record.data['root']}"
        same = corpus.facts == record.data
        if not found.expect(same, "data", good, f"{how}other data than recorded: {_other_facts(corpus, record.data)}"):
            return found
        chosen = choose(record)
        done, total = 0, sum(map(record.steps_of, chosen))
        for stretch in chosen:
            told = f"replaying from {stretch.start or 'the seed'} to {stretch.names[-1]}", done
            progress(*told, total)
            attempt = Attempt(record, corpus, runtime, stretch)
            attempt.run(partial(_tell, progress, *told, total))
            done += record.steps_of(stretch)
            if (
                attempt.difference is None and not attempt.others
            ):  # equal states with made-up figures are not vouched for
                equal += [name for name in stretch.names if attempt.states.get(name) == record.states[name]]
            _report(attempt, found, tolerance)
    if signer is not None and equal:
        _sign(record, equal, signer, runtime)
        found.holds("coverage", str(coverage(record.events, read_replays(run))))
    return found


def _tell(progress: Progress, text: str, before: int, total: int, steps: int) -> None:
    progress(text, before + steps, total)


class Attempt:
    """One stretch done again. After `run`: the states it came to, and the first step that went otherwise."""

    def __init__(self, record: Record, corpus: Corpus, runtime: Runtime, stretch: Stretch) -> None:
        self.record, self.corpus, self.stretch = record, corpus, stretch
        self.training = Training(record.recipe, runtime)
        self.measuring = Measuring(record.recipe, corpus)
        self.states: dict[str, str] = {}
        self.measured: list[str] = []  # evaluations done again
        self.others: list[str] = []  # those that came out otherwise
        self.difference: StepDifference | None = None
        self.worst_loss = 0.0  # largest relative difference of a loss
        self.done = 0

    @property
    def equal(self) -> bool:
        return all(self.states[name] == self.record.states[name] for name in self.stretch.names)

    @property
    def circumstances(self) -> list[str]:
        """What is otherwise here than where the run was made: class of machine, code."""
        here = self.training.describe_machine() | {"code": code_identity()["files"]}
        there = self.record.machine | {"code": self.record.code["files"]}
        names = [name for name in (*MACHINE_CLASS, "code") if here.get(name) != there.get(name)]
        return [f"{name} {there.get(name)} there, {here.get(name)} here" for name in names]

    def run(self, tell: Callable[[int], None] = lambda steps: None) -> None:
        """`tell` hears of steps done. Raises CheckpointError where the state to begin with is not the recorded one."""
        self.tell = tell
        if self.stretch.start is not None:
            tensors, meta = load_state(self.record.run.checkpoints / self.stretch.start)
            if state_hash(tensors, meta) != self.record.states[self.stretch.start]:
                raise CheckpointError(
                    f"checkpoints/{self.stretch.start}: not the recorded state; see `glasklar verify`"
                )
            self.training.restore(tensors, meta)
        while self.stretch.names[-1] not in self.states:
            index = self.training.position.stage
            if self.record.trained(index):
                self._stage(index)
            else:
                self.training.skip(index)

    def _stage(self, index: int) -> None:
        """Goes on with a stage to its end, or to the end of the stretch."""
        stage, training = self.record.recipe.stages[index], self.training
        if training.position.step == 0:
            training.enter(index)
        runner = training.runner(index, self.corpus, self.record.run.checkpoints)
        for step in range(training.position.step + 1, stage.steps + 1):
            self._compare(index, step, training.advance(runner, index))
            self.done += 1
            self.tell(self.done)
            name = checkpoint_name(index, stage.kind, step)
            if name in self.stretch.names:
                self.states[name] = state_hash(*training.state(index))
            self._measure(index, step)
            if name == self.stretch.names[-1]:
                return

    def _measure(self, index: int, step: int) -> None:
        """Evaluates where the run did, and compares: a figure made up in all places of a record shows here alone."""
        stages, record = self.record.recipe.stages, self.record
        stage, model, measuring = stages[index], self.training.model, self.measuring
        if isinstance(stage, RLStage) and (step == stage.steps or step % stage.evaluate_every == 0):
            self._held_against(record.watched(index, step), measuring.watch(model, step))
        if step < stage.steps:
            return
        if measuring.measured(index):
            self._held_against(record.evaluations(index), measuring.after(model, index))
        following = stages[index + 1] if index + 1 < len(stages) else None
        if isinstance(following, RLStage):
            again = {"evaluation": "readiness", "step": 0, **measuring.readiness(model, following)}
            self._held_against(record.readiness(index + 1), again)

    def _held_against(self, recorded: list[dict[str, Any]], again: dict[str, Any]) -> None:
        again = json.loads(json.dumps(again))
        name = f"{again['evaluation']} (step {again['step']})"
        self.measured.append(name)
        if not recorded:
            self.others.append(f"{name}: not recorded")
        for line in recorded:
            place = next(_places(line, again), None)
            if place is not None:
                self.others.append(f"{name}: {place}")

    def _compare(self, index: int, step: int, figures: dict[str, Any]) -> None:
        """A step's figures with the recorded ones; "tokens" is counted on there and follows from the data."""
        recorded = self.record.line(index, step)
        place = f"{self.record.recipe.stages[index].kind} step {step}"
        if recorded is None:
            self.difference = self.difference or StepDifference(
                place=place, figure="the step", recorded="nothing", here="done"
            )
            return
        here = json.loads(json.dumps(figures))
        for name in [name for name in here if name != "tokens"]:
            if here[name] != recorded.get(name) and self.difference is None:
                self.difference = StepDifference(place=place, figure=name, recorded=recorded.get(name), here=here[name])
        if "loss" in here and recorded.get("loss"):
            self.worst_loss = max(self.worst_loss, abs(here["loss"] / recorded["loss"] - 1))


def _report(attempt: Attempt, found: Findings, tolerance: float | None) -> None:
    stretch = attempt.stretch
    subject = f"{stretch.start or 'seed'} to {stretch.names[-1]}"
    other = attempt.circumstances
    if attempt.equal and attempt.difference is None and not attempt.others:
        measured = f" and {len(attempt.measured)} evaluations" if attempt.measured else ""
        text = f"{len(stretch.names)} recorded states come out equal, bit for bit, and so do all figures{measured}"
        found.holds(subject, text)
    elif attempt.equal:
        first = attempt.difference or attempt.others[0]
        found.fails(subject, f"the states are equal, the recorded figures are not: first at {first}")
    elif tolerance is not None and other:
        near = attempt.worst_loss <= tolerance
        text = (
            f"other bits under other circumstances ({'; '.join(other)}); tolerance check, no proof: losses differ "
            f"by up to {attempt.worst_loss:.2e} of their size, allowed were {tolerance:.2e}"
        )
        (found.unchecked if near else found.fails)(subject, text)
    else:
        wrong = next(name for name in stretch.names if attempt.states[name] != attempt.record.states[name])
        where = attempt.difference or "no step's figures differ, only the state does"
        text = f"another state than recorded at {wrong}; first difference: {where}"
        found.fails(subject, text + (f". Other circumstances: {'; '.join(other)}" if other else ""))


def _places(recorded: dict[str, Any], here: dict[str, Any], at: str = "") -> Iterator[str]:
    """Where two evaluations differ, their time aside."""
    for name in sorted(recorded.keys() | here.keys()):
        if not at and name in ("tokens", "seconds"):
            continue
        one, two, place = recorded.get(name), here.get(name), f"{at}.{name}" if at else name
        if isinstance(one, dict) and isinstance(two, dict):
            yield from _places(one, two, place)
        elif one != two:
            yield f"{place} is {two}, recorded was {one}"


def _other_facts(corpus: Corpus, recorded: dict[str, Any]) -> str:
    names = sorted(corpus.facts.keys() | recorded.keys())
    other = [
        f"{name} is {corpus.facts.get(name)}, recorded was {recorded.get(name)}"
        for name in names
        if corpus.facts.get(name) != recorded.get(name)
    ]
    return "; ".join(other)


def _speed(record: Record, stretch: Stretch) -> float:
    """How far the weights went a step in a stretch, relative to their size; from kept states, which the ledger binds.
    A stretch that does not end in one (it is lost, or the run goes on) counts as endless: it must be looked at."""
    if not record.kept(stretch.names[-1]):
        return float("inf")
    ended, end = load_state(record.run.checkpoints / stretch.names[-1])
    if stretch.start is None:
        training = Training(record.recipe, Runtime(device="cpu", compute=record.recipe.compute))
        training.enter(0)
        began, begin = training.state(0)
    else:
        began, begin = load_state(record.run.checkpoints / stretch.start)
    masters = [name for name in ended if name.startswith("master.") and name in began]
    moved = sum((ended[name].double() - began[name].double()).square().sum().item() for name in masters)
    size = sum(began[name].double().square().sum().item() for name in masters)
    steps = _steps_done(record, end) - _steps_done(record, begin)
    return (moved / size) ** 0.5 / steps


def _steps_done(record: Record, meta: dict[str, Any]) -> int:
    position, stages = meta["position"], record.recipe.stages
    return position["step"] + sum(stages[i].steps for i in range(position["stage"]) if record.trained(i))


def _sign(record: Record, names: Sequence[str], signer: Signer, runtime: Runtime) -> None:
    """Adds a line to the coverage table, unless the same line is there."""
    predicate = {
        "ledger_head": record.head.hash,
        "recipe": record.recipe.hash,
        "machine": runtime.describe(),
        "code": code_identity(),
    }
    envelope = signer.sign(REPLAY_KIND, {name: record.states[name] for name in names}, predicate)
    line = canonical_json(envelope) + b"\n"
    path = record.run.replays_file
    before = path.read_bytes() if path.is_file() else b""
    if line not in before:
        write_atomic(path, before + line)
