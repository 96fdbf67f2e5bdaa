"""What a task is: a generator of problems with worked thoughts, and a checker of answers.

The same task makes training text, rewards and evaluations. Which split a problem belongs to is decided by the hash of
its content (not of its wording or language), so that training, validation and test can never meet.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from glasklar.config import Section
from glasklar.errors import RecipeError

Split = Literal["train", "valid", "test"]
Language = Literal["en", "de"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem.

    key        canonical content, the same for every wording and language ("3+4-2"); decides the split
    question   what a person would ask
    thought    a worked solution that ends with the result; one step a line
    answer     the answer as it should be given
    """

    task: str
    key: str
    question: str
    thought: str
    answer: str
    language: Language


class Task(ABC):
    """A family of problems. `Options` (a Section) holds what a recipe may set: sizes, ranges, languages."""

    name: ClassVar[str]
    Options: ClassVar[type[Section]]

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.options: Any = self.Options.read(dict(options or {}), f"task {self.name!r}")

    @abstractmethod
    def sample(self, rng: random.Random) -> Problem:
        """One problem drawn with `rng`; nothing else may influence it."""

    @abstractmethod
    def check(self, problem: Problem, answer: str) -> bool:
        """Whether `answer`, as a model wrote it after its thinking, solves the problem."""

    def draw(self, split: Split, seed: int, index: int) -> Problem:
        """Problem number `index` of a split under a seed. Raises RecipeError where the options leave a split empty."""
        rng = random.Random(f"{seed}/{self.name}/{split}/{index}")
        for _ in range(1000):
            problem = self.sample(rng)
            if split_of(problem) == split:
                return problem
        raise RecipeError(f"task {self.name!r}: no {split} problem in 1000 draws; widen its options {self.options!r}")


def split_of(problem: Problem) -> Split:
    """train 80 %, valid 10 %, test 10 %, by SHA-256 of task and key."""
    digest = hashlib.sha256(f"{problem.task}\n{problem.key}".encode()).digest()
    match int.from_bytes(digest[:8], "big") % 10:
        case 0:
            return "test"
        case 1:
            return "valid"
        case _:
            return "train"
