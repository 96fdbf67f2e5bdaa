"""The tasks by name, and tasks that an extension brings as "module:ClassName"."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, Final

from glasklar.errors import RecipeError
from glasklar.tasks.base import Task
from glasklar.tasks.chain_sum import SumTask
from glasklar.tasks.countdown import CountdownTask
from glasklar.tasks.equation import EquationTask
from glasklar.tasks.gym import GymTask
from glasklar.tasks.letters import LettersTask
from glasklar.tasks.scope import ScopeTask
from glasklar.tasks.sorting import SortTask
from glasklar.tasks.story import StoryTask

TASKS: Final[dict[str, type[Task]]] = {
    "sum": SumTask,
    "letters": LettersTask,
    "sort": SortTask,
    "countdown": CountdownTask,
    "equation": EquationTask,
    "story": StoryTask,
    "scope": ScopeTask,
    "gym": GymTask,
}


def make_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of a name ("sum") or of a class ("my_module:MyTask") with these options. Raises RecipeError."""
    return (_load(name) if ":" in name else _known(name))(options)


def _known(name: str) -> type[Task]:
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known tasks: {', '.join(sorted(TASKS))}"
    raise RecipeError(f"unknown task {name!r}; {hint}")


def _load(reference: str) -> type[Task]:
    module_name, _, class_name = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(f"task {reference!r} cannot be loaded: {error}; write it as 'module:ClassName'") from None
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise RecipeError(f"task {reference!r} is not a class derived from glasklar.tasks.base.Task")
    return found
