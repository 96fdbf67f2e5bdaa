"""What docs/recipes.md says works as it stands there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from glasklar.data.procedural import Mixture
from glasklar.recipe import DistilStage, builtin_recipes, load_recipe, recipe_path
from glasklar.tasks.base import split_of

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The recipe of the student with the page's stage and task."""
    [stage, task], [module] = blocks("toml"), blocks("python")
    (tmp_path / "my_tasks.py").write_text(module, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = recipe_path("spark-small").read_text(encoding="utf-8").replace("[[sources]]", f"{task}\n[[sources]]", 1)
    path = tmp_path / "my.toml"
    path.write_text(text.replace("[evaluation]", f"{stage}\n[evaluation]", 1), encoding="utf-8")
    yield path
    sys.modules.pop("my_tasks", None)


def test_stage_and_task_of_the_page(recipe: Path) -> None:
    loaded = load_recipe(str(recipe))
    assert isinstance(loaded.stages[-1], DistilStage)
    for hard, digits in ((False, 4), (True, 6)):
        task = next(t for t in Mixture.of(loaded.tasks, hard=hard).tasks if t.name == "my_tasks:LargerTask")
        problem = task.draw("test", 0, 0)
        assert task.options.digits == digits
        assert split_of(problem) == "test"
        assert task.check(problem, f" {problem.answer} ")
        assert not task.check(problem, "-1")


def test_the_page_names_all_recipes_and_what_it_links_to() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"{name}.toml" in text for name in builtin_recipes())
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (PAGE.parent / link).is_file(), link
