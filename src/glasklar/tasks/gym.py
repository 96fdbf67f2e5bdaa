"""Tasks of the library `reasoning-gym` (extra "gym") as tasks of a recipe; English, without worked thoughts."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import Field

from glasklar.config import Section
from glasklar.errors import RecipeError
from glasklar.tasks.base import Problem, Task


@dataclass(frozen=True, kw_only=True)
class GymProblem(Problem):
    """A problem with the entry it came from, which the library's scorer wants back."""

    entry: Mapping[str, Any] = field(compare=False, repr=False)


class GymOptions(Section):
    """dataset   name of the library ("chain_sum")
    config    settings of that dataset, as the library knows them ({min_terms = 2})
    size      how many problems the dataset holds; all splits share them
    passing   least score, of 0 to 1, that counts as solved"""

    dataset: str
    config: dict[str, Any] = Field(default_factory=dict)
    size: int = Field(default=100_000, ge=1, le=1 << 30)
    passing: float = Field(default=1.0, gt=0.0, le=1.0)


class GymTask(Task):
    """A dataset of `reasoning-gym` with its own scorer as the checker. Raises RecipeError without the library."""

    name: ClassVar[str] = "gym"
    Options: ClassVar[type[GymOptions]] = GymOptions
    options: GymOptions

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self._dataset = _open(self.options)

    def sample(self, rng: random.Random) -> GymProblem:
        entry = self._dataset[rng.randrange(self.options.size)]
        if entry["answer"] is None:
            raise RecipeError(
                f"task 'gym': dataset {self.options.dataset!r} has problems without an answer; use another"
            )
        return GymProblem(
            task=self.name,
            key=f"{self.options.dataset} {entry['question']}",
            question=entry["question"],
            thought="",
            answer=str(entry["answer"]),
            language="en",
            entry=entry,
        )

    def check(self, problem: Problem, answer: str) -> bool:
        if not isinstance(problem, GymProblem):
            raise TypeError(f"a problem of {type(self).__name__} is expected, not {problem!r}")
        return float(self._dataset.score_answer(answer.strip(), problem.entry)) >= self.options.passing


def _open(options: GymOptions) -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise RecipeError("task 'gym' needs the library reasoning-gym: pip install 'glasklar[gym]'") from None
    try:
        return reasoning_gym.create_dataset(options.dataset, **{**options.config, "seed": 0, "size": options.size})
    except (ValueError, TypeError, AssertionError) as error:
        what = f"dataset {options.dataset!r} with {options.config} and size {options.size}"
        raise RecipeError(f"task 'gym': {what}: {error}; mend 'dataset', 'config' or 'size'") from None
