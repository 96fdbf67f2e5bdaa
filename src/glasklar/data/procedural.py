"""Problems of the tasks as training text, demonstrations and prompts, always in an order fixed by a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from glasklar.config import Section
from glasklar.data.documents import Document
from glasklar.data.tokenizer import ASSISTANT, END_THINK, THINK, USER
from glasklar.tasks.base import Problem, Split, Task
from glasklar.tasks.catalogue import make_task

ANSWER = {"en": "Answer", "de": "Antwort"}
LICENCE = "CC0-1.0"
PAGE = 64  # problem numbers set aside for one page


class TaskEntry(Section):
    """One task of a recipe.

    weight    share among the tasks of the recipe
    options   what the task's own `Options` know
    hard      options for a harder range: evaluated, never trained
    reason    whether it counts as reasoning: trained by RL and part of the mean (false: only kept alive, like refusals)
    """

    name: str
    weight: float = Field(default=1.0, gt=0)
    options: dict[str, Any] = Field(default_factory=dict)
    hard: dict[str, Any] | None = None
    reason: bool = True


class TaskSource(Section):
    """Problems written out for pretraining, in two forms: exercise-book pages and exchanges.

    documents         how many
    thoughts          share of problems with a worked thought; the others give the bare answer
    pages             share of documents that are exercise-book pages: several bare problems of one task
    problems_a_page   on such a page
    question_weight   loss weight of the question in an exchange: its numbers cannot be predicted, only its wording
    """

    kind: Literal["tasks"] = "tasks"
    documents: int = Field(ge=1)
    thoughts: float = Field(default=0.5, ge=0, le=1)
    pages: float = Field(default=0.5, ge=0, le=1)
    problems_a_page: int = Field(default=3, ge=1)
    question_weight: float = Field(default=1.0, ge=0, le=1)


@dataclass(frozen=True)
class Mixture:
    """Tasks with their shares; draws problems by number."""

    tasks: tuple[Task, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, entries: Sequence[TaskEntry], *, hard: bool = False) -> Mixture:
        """The tasks of a recipe; `hard` takes their harder ranges (tasks without one are left out)."""
        chosen = [entry for entry in entries if not hard or entry.hard is not None]
        options = [{**entry.options, **(entry.hard or {})} if hard else entry.options for entry in chosen]
        tasks = tuple(make_task(entry.name, each) for entry, each in zip(chosen, options, strict=True))
        return cls(tasks, tuple(entry.weight for entry in chosen))

    def draw(self, split: Split, seed: int, index: int) -> tuple[Task, Problem]:
        """Task and problem number `index` of a split."""
        task = random.Random(f"{seed}/task/{index}").choices(self.tasks, self.weights)[0]
        return task, task.draw(split, seed, index)


def as_exchange(problem: Problem, thought: bool) -> str:
    """A problem as a person and the model would speak of it; begins after the beginning-of-sentence token."""
    opening = f"{THINK}{problem.thought}" if thought and problem.thought else ""
    return f"{USER}{problem.question}{ASSISTANT}{opening}{END_THINK}{problem.answer}"


def as_exercise(problem: Problem, thought: bool) -> str:
    """A bare problem as an exercise book shows it: content, working, result."""
    working = f"{problem.thought}\n" if thought and problem.thought else ""
    return f"{problem.key}\n{working}{ANSWER[problem.language]}: {problem.answer}"


def documents(source: TaskSource, mixture: Mixture, seed: int) -> Iterator[Document]:
    """The pretraining documents of a task source: training problems only. Special tokens in their text are meant."""
    for index in range(source.documents):
        rng = random.Random(f"{seed}/form/{index}")
        task, problem = mixture.draw("train", seed, index)
        if problem.thought and rng.random() < source.pages:
            more = [
                task.draw("train", seed, source.documents + index * PAGE + i) for i in range(1, source.problems_a_page)
            ]
            text = "\n".join(as_exercise(each, rng.random() < source.thoughts) for each in [problem, *more])
        else:
            text = as_exchange(problem, rng.random() < source.thoughts)
        yield Document(
            text=text, source=f"task:{problem.task}", licence=LICENCE, date="", origin=f"{seed}/train/{index}"
        )


def demonstrations(
    mixture: Mixture, seed: int, first: int, count: int, thoughts: float
) -> Iterator[tuple[Problem, bool]]:
    """Training problems for SFT, each with whether its thought is to be shown."""
    for index in range(first, first + count):
        yield mixture.draw("train", seed, index)[1], _uniform(seed, "shown", index) < thoughts


def _uniform(seed: int, purpose: str, index: int) -> float:
    return random.Random(f"{seed}/{purpose}/{index}").random()
