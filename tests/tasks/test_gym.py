"""The adapter for `reasoning-gym` against the library's own scorer."""

import builtins

import pytest

from glasklar.errors import RecipeError
from glasklar.tasks.base import Problem
from glasklar.tasks.catalogue import make_task
from glasklar.tasks.selfcheck import faults


def test_missing_library_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "reasoning_gym":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RecipeError, match=r"pip install 'glasklar\[gym\]'"):
        make_task("gym", {"dataset": "chain_sum"})


class TestWithLibrary:
    @pytest.fixture(autouse=True)
    def _library(self):
        pytest.importorskip("reasoning_gym")

    def test_problems_and_scores_are_the_library_s(self):
        task = make_task("gym", {"dataset": "chain_sum", "config": {"min_terms": 3, "max_terms": 3}})
        assert faults(task, draws=100) == []
        problem = task.draw("test", 0, 0)
        assert len(problem.entry["metadata"]["expression"].split()) == 5
        assert task.check(problem, problem.answer)
        assert not task.check(problem, str(int(problem.answer) + 1))

    def test_passing_score_is_a_choice(self):
        strict, mild = (make_task("gym", {"dataset": "letter_jumble", "passing": p}) for p in (1.0, 0.01))
        problem = strict.draw("train", 0, 0)
        wrong = "something else entirely"
        assert strict.check(problem, problem.answer)
        assert not strict.check(problem, wrong)
        assert mild.check(problem, wrong) == (mild._dataset.score_answer(wrong, problem.entry) >= 0.01)

    def test_unknown_dataset_and_setting(self):
        with pytest.raises(RecipeError, match="no_such_set"):
            make_task("gym", {"dataset": "no_such_set"})
        with pytest.raises(RecipeError, match="wrong_setting"):
            make_task("gym", {"dataset": "chain_sum", "config": {"wrong_setting": 1}})

    def test_dataset_without_answers_is_refused(self):
        with pytest.raises(RecipeError, match="without an answer"):
            make_task("gym", {"dataset": "graph_color"}).draw("train", 0, 0)

    def test_problem_of_another_task_is_refused(self):
        other = Problem(task="sum", key="1+1", question="", thought="", answer="2", language="en")
        with pytest.raises(TypeError, match="GymTask"):
            make_task("gym", {"dataset": "chain_sum"}).check(other, "2")
