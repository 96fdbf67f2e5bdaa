"""Carries a recipe out in a run folder: corpus, stages, checkpoints, evaluations, the released model. Resumes where it
stopped. Everything that happens goes into the ledger; what a person watches goes to a `Reporter`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

from glasklar.corpus import Corpus, only_tasks, prepare
from glasklar.distil import Teachers
from glasklar.errors import CheckpointError
from glasklar.learn.state import checkpoint_name, latest, load_state, prune, save_state, saved_hash
from glasklar.measuring import Measuring
from glasklar.model.checkpoint import save_model
from glasklar.model.transformer import Transformer
from glasklar.provenance.energy import EnergyMeter
from glasklar.provenance.environment import describe_environment
from glasklar.provenance.hashing import sha256_file
from glasklar.provenance.metrics import START, read_metrics
from glasklar.provenance.rundir import RunDir
from glasklar.recipe import AnyStage, PretrainStage, Recipe, RLStage
from glasklar.rl.doctor import NORMAL
from glasklar.runtime import Runtime
from glasklar.segment import Segment, work_after
from glasklar.training import Position, Training, state_at

KEPT_CHECKPOINTS = 2


class Reporter(Protocol):
    """Where news of a run goes. The pipeline knows no terminal."""

    def stage(self, name: str, step: int, of: int) -> None: ...

    def step(self, line: dict[str, Any]) -> None: ...

    def evaluation(self, line: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def work(self, text: str, done: int, total: int) -> None: ...


class Stop:
    """A wish to stop. While steps are made it is heeded after the one under way, with a checkpoint, so that nothing has
    to be done again; elsewhere, and for who asks twice, at once. `kept`: it ended with that checkpoint."""

    def __init__(self) -> None:
        self.stepping = self.asked = self.kept = False

    def ask(self) -> None:
        """Raises KeyboardInterrupt where it is heeded at once."""
        if self.asked or not self.stepping:
            raise KeyboardInterrupt
        self.asked = True


class Pipeline:
    """One run of one recipe. `execute` does what is left to do; it may be called on a finished run. `home`: where the
    names of teachers are looked up."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        runtime: Runtime,
        reporter: Reporter,
        home: Path,
        stop: Stop | None = None,
    ) -> None:
        self.recipe, self.run, self.runtime, self.reporter = recipe, run, runtime, reporter
        self.home, self.stop = home, stop or Stop()
        self.training = Training(recipe, runtime)
        self.model = self.training.model
        self.corpus: Corpus
        self.measuring: Measuring
        self.segment: Segment | None = None
        self.taught: dict[str, Any] = {}  # what teachers took, if they were asked now
        self.seconds_before = 0.0
        self.started = time.monotonic()

    @property
    def position(self) -> Position:
        return self.training.position

    def execute(self) -> None:
        """Runs all stages that are left and releases the model. What ends it early is recorded and raised.

        Raises CheckpointError for a run that was abandoned.
        """
        if abandoned := self.run.ledger.of("abandoned"):
            raise CheckpointError(
                f"{self.run.path}: was abandoned ({abandoned[0].data['reason']}); start anew with another --run"
            )
        if self.run.ledger.of("released"):
            self.reporter.note("this run is complete")
            return
        try:
            self._open()
            if self.position.stage and not self.position.step:
                self._evaluate(self.position.stage - 1)  # whatever followed the last checkpoint is done again
            for index in range(self.position.stage, len(self.recipe.stages)):
                self._stage(index)
            self._release()
        except KeyboardInterrupt:
            self._ended("stopped")
            raise
        except Exception as error:
            self._ended("failed", error=str(error), kind=type(error).__name__)
            raise

    # --- beginning and going on -----------------------------------------------------------------------------------

    def _open(self) -> None:
        ledger = self.run.ledger
        newest = latest(self.run.checkpoints, {event.data["state_hash"] for event in ledger.of("checkpoint")})
        if not ledger.of("run"):
            environment = describe_environment()
            ledger.append(
                "run",
                {
                    "recipe": self.recipe.hash,
                    "seed": self.recipe.seed,
                    "machine": self.training.describe_machine(),
                    **environment,
                },
            )
        else:
            machine = self.training.describe_machine()
            lost = work_after(self._recorded(newest) if newest else None, read_metrics(self.run.metrics_file))
            name = newest.name if newest else None
            ledger.append("resumed", {"checkpoint": name, "machine": machine, "lost": lost})
        self.reporter.note("reading the sources, training the tokenizer")
        teachers = Teachers(home=self.home, runtime=self.runtime, tell=self.reporter.work, during=self._metered)
        self.corpus = prepare(self.recipe, self.run.path / "data", self.runtime.threads, teachers)
        self.measuring = Measuring(self.recipe, self.corpus)
        if not self.corpus.held_out and not only_tasks(self.recipe):
            share = self.recipe.evaluation.held_out
            self.reporter.note(f"evaluation.held_out = {share} keeps no document from training: no bits per byte then")
        if not ledger.of("data"):
            ledger.append("data", self.corpus.facts)
            ledger.append(
                "tokenizer", {"hash": self.corpus.tokenizer.hash, "vocab_size": self.corpus.tokenizer.vocab_size}
            )
            if self.taught:
                ledger.append("taught", self.taught)
            for found in self.corpus.facts.get("traces", {}).values():
                self.reporter.note(told(found))
        if newest is None:
            self.run.metrics.cut(START)
        else:
            self._restore(newest)

    @contextmanager
    def _metered(self) -> Iterator[None]:
        began, meter = time.monotonic(), EnergyMeter(self.runtime.device).start()
        yield
        energy = meter.stop()
        self.taught = {"seconds": time.monotonic() - began, "energy": energy.record(), "cost": energy.cost()}

    def _restore(self, folder: Path) -> None:
        self.training.restore(*load_state(folder))
        recorded = self._recorded(folder)
        self.run.metrics.cut(recorded["metrics"])
        self.seconds_before = recorded["seconds_total"]
        self.reporter.note(f"going on from {folder.name}")

    def _recorded(self, folder: Path) -> dict[str, Any]:
        """Data of the event of a kept checkpoint."""
        digest = saved_hash(folder)
        return next(e.data for e in reversed(self.run.ledger.of("checkpoint")) if e.data["state_hash"] == digest)

    def _ended(self, how: Literal["stopped", "failed"], **why: str) -> None:
        """Records where a run ended early, and the work since the last checkpoint, if a stage was under way. A run that
        had not begun has no record yet."""
        if self.run.ledger.of("run"):
            lost = self.segment.lost() if self.segment is not None else None
            self.run.ledger.append(how, {**why, "position": asdict(self.position), "lost": lost})

    # --- stages ---------------------------------------------------------------------------------------------------

    def _stage(self, index: int) -> None:
        stage, position = self.recipe.stages[index], self.position
        self.reporter.stage(stage.kind, position.step, stage.steps)
        if position.step == 0:
            if isinstance(stage, RLStage) and not self._ready(stage):
                self.training.skip(index)
                return
            self.training.enter(index)
        runner = self.training.runner(index, self.corpus, self.run.checkpoints)
        segment = self._begin_segment(stage)
        self.stop.stepping = True
        for step in range(position.step, stage.steps):
            figures = self.training.advance(runner, index)
            self._report(segment.line(step + 1, position.tokens, figures, self.seconds))
            done = step + 1 == stage.steps
            if isinstance(stage, RLStage) and (done or (step + 1) % stage.evaluate_every == 0):
                self._watch(step + 1)
            if done or (step + 1) % stage.checkpoint_every == 0 or self.stop.asked:
                self._checkpoint(index, step + 1, segment)
                if self.stop.asked:
                    self.stop.kept = True
                    raise KeyboardInterrupt
                segment = self._begin_segment(stage)
        self.segment, self.stop.stepping = None, False
        self._evaluate(index)

    def _ready(self, stage: RLStage) -> bool:
        """Whether thinking is right often enough, and clearly better than answering at once, for RL to amplify it."""
        self.reporter.note("is the model ready for reinforcement? asking with and without thinking")
        data = self.measuring.readiness(self.model, stage)
        self.run.ledger.append("readiness", data)
        ready, wanted = data["ready"], stage.readiness
        verdict = (
            "RL begins"
            if ready
            else f"RL is left out: it needs thinking >= {wanted.accuracy:.0%} and {wanted.margin:.0%} "
            "above direct answers; pretrain longer or make the tasks easier"
        )
        self.reporter.note(f"right with thinking {data['thinking']:.0%}, without {data['direct']:.0%}: {verdict}")
        if ready:
            self.reporter.note(NORMAL)
        return ready

    # --- what is recorded -----------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Wall clock of the whole run so far, earlier processes included."""
        return self.seconds_before + time.monotonic() - self.started

    def _begin_segment(self, stage: AnyStage) -> Segment:
        self.segment = Segment(stage, self.recipe, EnergyMeter(self.runtime.device).start())
        return self.segment

    def _report(self, line: dict[str, Any]) -> None:
        self.run.metrics.append(line)
        self.reporter.step(line)

    def _checkpoint(self, index: int, step: int, segment: Segment) -> None:
        folder = self.run.checkpoints / checkpoint_name(index, self.recipe.stages[index].kind, step)
        digest = save_state(folder, *self.training.state(index))
        self.segment = None
        data = {"name": folder.name, **segment.close(step, digest, self.run.metrics.mark())}
        self.run.ledger.append("checkpoint", {**data, "seconds_total": self.seconds})
        prune(self.run.checkpoints, KEPT_CHECKPOINTS)

    # --- evaluations ----------------------------------------------------------------------------------------------

    def _watch(self, step: int) -> None:
        self._record(self.measuring.watch(self.model, step), in_ledger=False)

    def _evaluate(self, index: int) -> None:
        if not self.measuring.measured(index):
            return
        text = isinstance(self.recipe.stages[index], PretrainStage)
        what = "measuring bits per byte on held-out documents" if text else "evaluating on unseen problems"
        self.reporter.note(what)
        self._record(self.measuring.after(self.model, index), in_ledger=True)

    def _record(self, line: dict[str, Any], *, in_ledger: bool) -> None:
        line = {**line, "tokens": self.position.tokens, "seconds": self.seconds}
        self.run.metrics.append(line)
        if in_ledger:
            self.run.ledger.append("evaluation", line)
        self.reporter.evaluation(line)

    # --- the end --------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        extra = {"recipe.json": self.recipe.canonical().encode(), **self.corpus.tokenizer.files()}
        save_model(self.model, self.run.model, extra=extra)
        files = {path.name: sha256_file(path) for path in sorted(self.run.model.iterdir())}
        self.run.ledger.append("released", {"files": files, "skipped": self.position.skipped, "seconds": self.seconds})


def told(traces: dict[str, Any]) -> str:
    """What a teacher's answers came to."""
    long = f", {traces['too_long']:,} too long for the rows" if traces["too_long"] else ""
    return (
        f"{traces['teacher']} answered {traces['right']:,} of {traces['answers']:,} times rightly; "
        f"{traces['kept']:,} answers are kept{long}"
    )


def state_after(recipe: Recipe, run: Path, index: int, runtime: Runtime) -> Transformer:
    """The model at the end of stage `index` of a run, from its checkpoint. Raises CheckpointError if there is none."""
    stage = recipe.stages[index]
    name = checkpoint_name(index, stage.kind, stage.steps)
    return state_at(recipe, RunDir(run).checkpoints / name, runtime)
