"""Distillation: a teacher's answers to a recipe's training problems, of which those that the checkers find right become
demonstrations (DeepSeek-R1, arXiv 2501.12948, section 2.4; rejection sampling as in its section 2.3.3). Text goes from
teacher to student, so the two need share neither tokenizer nor shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import Any

from glasklar.data.chat import demonstration, parse
from glasklar.data.procedural import Mixture
from glasklar.data.tokenizer import Tokenizer
from glasklar.engine.engine import Engine
from glasklar.errors import CheckpointError, DataError, RequestError
from glasklar.eval.answers import Answer, ask
from glasklar.loading import find_model, load
from glasklar.model.cost import decode_flops_per_token
from glasklar.provenance.files import write_atomic, writing
from glasklar.provenance.hashing import canonical_json, sha256_file
from glasklar.provenance.receipt import model_root
from glasklar.recipe import DistilStage, Recipe
from glasklar.runtime import Runtime

AT_ONCE = 256  # problems put to the teacher before the next news of it


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One answer of a teacher. number: of the problem among the training problems of its stage"""

    number: int
    question: str
    thought: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """Where teachers are found and what they run on. `tell` hears what is done, problems asked, and problems in all;
    `during` is open while they are asked."""

    home: Path
    runtime: Runtime
    tell: Callable[[str, int, int], None] = lambda text, done, total: None
    during: Callable[[], AbstractContextManager[None]] = nullcontext


def traces_name(index: int) -> str:
    """The file of stage number `index` among the data of its run."""
    return f"traces-{index:02d}.jsonl"


def part_name(index: int) -> str:
    """The file that grows while the teacher of a stage answers."""
    return f"traces-{index:02d}.part"


def stages_taught(recipe: Recipe) -> list[tuple[int, DistilStage]]:
    return [(index, stage) for index, stage in enumerate(recipe.stages) if isinstance(stage, DistilStage)]


def find_teacher(stage: DistilStage, home: Path) -> Path:
    """The folder of a stage's teacher. Raises DataError where there is none of that name, or another than the recipe
    asks for."""
    try:
        folder = find_model(stage.teacher, home)
    except CheckpointError as error:
        raise DataError(f"teacher = {stage.teacher!r}: {error}") from None
    if stage.teacher_root is not None and (root := model_root(folder)) != stage.teacher_root:
        raise DataError(
            f"teacher = {stage.teacher!r}: {folder} has the root {root}, the recipe asks for {stage.teacher_root}; "
            "give the model that it names, or take teacher_root out"
        )
    return folder


def make_traces(recipe: Recipe, index: int, folder: Path, teachers: Teachers, tokenizer: Tokenizer) -> dict[str, Any]:
    """Lets the teacher of stage `index` answer, and writes what is right to `folder`; returns the facts about it. What
    is longer than a row of the stage in the student's `tokenizer` is left out: a piece of an answer teaches nothing.

    Everything follows from the teacher's weights, the recipe and the class of machine. Raises DataError where the
    teacher is missing, cannot be asked, or answers nothing rightly.
    """
    stage = recipe.stages[index]
    assert isinstance(stage, DistilStage)
    place = find_teacher(stage, teachers.home)
    try:
        model = load(place, teachers.runtime, None if stage.quantize else "bfloat16", quantize=stage.quantize)
    except CheckpointError as error:
        raise DataError(f"teacher = {stage.teacher!r}: {error}") from None
    if model.tokenizer is None:
        raise DataError(f"teacher = {stage.teacher!r}: {place} has no tokenizer.json, so it cannot be asked")
    engine, root, path = Engine(model.network), model_root(place), folder / traces_name(index)
    mixture = Mixture.of(recipe.tasks)
    rounds = Rounds(folder / part_name(index), [root, recipe.hash, index, AT_ONCE])
    for first in range(len(rounds.done) * AT_ONCE, stage.problems, AT_ONCE):
        teachers.tell("Teacher", first, stage.problems)
        try:
            answers = _asked(stage, mixture, _seed(recipe, index), engine, model.tokenizer, first)
        except RequestError as error:  # it takes no messages, or its context is too short
            raise DataError(f"teacher = {stage.teacher!r}: {error}") from None
        rounds.add(
            sampled=sum(len(answer.completion.ids) for answer in answers),
            right=sum(answer.correct for answer in answers),
            traces=[asdict(trace) for trace in _different(answers, model.tokenizer, stage, first)],
        )
    teachers.tell("Teacher", stage.problems, stage.problems)
    found = [Trace(**trace) for each in rounds.done for trace in each["traces"]]
    fits = [len(ids) <= stage.length for ids, _ in trace_tokens(found, tokenizer)]
    traces, sampled = list(compress(found, fits)), rounds.total("sampled")
    if found and not traces:
        raise DataError(
            f"teacher = {stage.teacher!r}: all of its {len(found):,} right answers are longer than the rows of "
            f"length = {stage.length} tokens; raise length"
        )
    if not traces:
        raise DataError(
            f"teacher = {stage.teacher!r}: none of its {stage.problems * stage.samples:,} answers is right, so there "
            "is nothing to learn from; take another teacher, tell it with `instruction` how to answer, or raise "
            "max_tokens"
        )
    write_atomic(path, b"".join(_line(asdict(trace)) for trace in traces))
    rounds.path.unlink()
    return {
        "teacher": model.name,
        "teacher_root": root,
        "licence": stage.licence,
        "problems": stage.problems,
        "answers": stage.problems * stage.samples,
        "right": rounds.total("right"),
        "kept": len(traces),
        "too_long": len(found) - len(traces),
        "sampled_tokens": sampled,
        "flops": sampled * decode_flops_per_token(model.config, stage.max_tokens),
        "file": sha256_file(path),
    }


class Rounds:
    """What a teacher has answered so far, a line a round, so that whoever stops it asks nothing twice. Lines after a
    torn one, and those of another teacher or recipe (`key`), count for nothing."""

    def __init__(self, path: Path, key: list[Any]) -> None:
        self.path, self.done = path, list[dict[str, Any]]()
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        head = _line(key)
        for line in lines[1:] if lines[:1] == [head] else []:
            try:
                self.done.append(json.loads(line))
            except ValueError:  # torn
                break
        write_atomic(path, head + b"".join(map(_line, self.done)))

    def add(self, **found: Any) -> None:
        self.done.append(found)
        with writing(self.path), self.path.open("ab") as file:
            file.write(_line(found))

    def total(self, name: str) -> int:
        return sum(each[name] for each in self.done)


def _line(value: Any) -> bytes:
    return canonical_json(value) + b"\n"


def _seed(recipe: Recipe, index: int) -> int:
    """Of the problems of a stage."""
    return recipe.seed * 1000 + index


def _asked(
    stage: DistilStage, mixture: Mixture, seed: int, engine: Engine, tokenizer: Tokenizer, first: int
) -> list[Answer]:
    """The teacher's answers of one round, to the problems from number `first` on."""
    return ask(
        engine,
        tokenizer,
        [mixture.draw("train", seed, i) for i in range(first, min(first + AT_ONCE, stage.problems))],
        max_tokens=stage.max_tokens,
        samples=stage.samples,
        temperature=stage.temperature,
        seed=(seed << 32) + first * stage.samples,
        thinking=stage.thinking,
        instruction=stage.instruction,
    )


def _different(answers: Sequence[Answer], tokenizer: Tokenizer, stage: DistilStage, first: int) -> Iterator[Trace]:
    """The right answers, each once, in the order in which they were sampled."""
    seen: set[Trace] = set()
    for place, answer in enumerate(answers):
        if not answer.correct:
            continue
        reply = parse(tokenizer, answer.completion.ids, stage.thinking)
        trace = Trace(
            number=first + place // stage.samples,
            question=answer.problem.question,
            thought=reply.reasoning.strip(),
            answer=reply.content.strip(),
        )
        if trace not in seen:
            seen.add(trace)
            yield trace


def read_traces(path: Path) -> list[Trace]:
    """Raises CheckpointError where a line is none of ours."""
    try:
        return [Trace(**json.loads(line)) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: no answers of a teacher ({error}); remove its folder to have it made again"
        ) from None


def trace_tokens(traces: Sequence[Trace], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[float]]]:
    """Ids and loss weights of what the student learns from."""
    for trace in traces:
        yield demonstration(tokenizer, trace.question, trace.thought or None, trace.answer)


def wrong_lines(recipe: Recipe, index: int, traces: Sequence[Trace]) -> list[int]:
    """Numbers, from 1, of those traces that answer no training problem of stage `index`, or not rightly by the task's
    checker."""
    stage, seed, mixture = recipe.stages[index], _seed(recipe, index), Mixture.of(recipe.tasks)
    assert isinstance(stage, DistilStage)

    def right(trace: Trace) -> bool:
        if not 0 <= trace.number < stage.problems:
            return False
        task, problem = mixture.draw("train", seed, trace.number)
        return problem.question == trace.question and task.check(problem, trace.answer)

    return [line for line, trace in enumerate(traces, start=1) if not right(trace)]
