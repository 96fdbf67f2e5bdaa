"""Evaluation: the unbiased estimator, and a model whose answers are known."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import pytest

from glasklar.eval.tasks import Scores, pass_at_k, table


@pytest.mark.parametrize(("samples", "right", "k"), [(5, 0, 2), (5, 2, 2), (6, 3, 4), (6, 6, 1), (8, 1, 8)])
def test_pass_at_k_is_the_mean_over_all_choices(samples: int, right: int, k: int) -> None:
    tries = [True] * right + [False] * (samples - right)
    assert pass_at_k(samples, right, k) == pytest.approx(fmean(any(chosen) for chosen in combinations(tries, k)))


def test_the_mean_leaves_out_tasks_that_do_not_reason() -> None:
    scores = {
        "sum": Scores(n=10, greedy=0.5, thought=1.0, length=10.0, pass1=0.4, pass_k=0.9),
        "letters": Scores(n=10, greedy=0.7, thought=1.0, length=20.0, pass1=0.6, pass_k=1.0),
        "scope": Scores(n=10, greedy=0.0, thought=0.0, length=5.0),
    }
    result = table(scores, ["sum", "letters"])
    assert result["mean"]["greedy"] == pytest.approx(0.6)
    assert result["mean"]["pass@16"] == pytest.approx(0.95)
    assert "thinking" not in result["mean"]
    assert set(result["tasks"]) == {"sum", "letters", "scope"}
    assert result["tasks"]["sum"]["pass@1"] == 0.4


def test_of_fewer_samples_pass_at_k_says_so() -> None:
    scores = {"sum": Scores(n=10, greedy=0.5, thought=1.0, length=10.0, pass1=0.4, pass_k=0.6, k=2)}
    assert table(scores, ["sum"])["mean"] == {"greedy": 0.5, "length": 10.0, "pass@1": 0.4, "pass@2": 0.6}


def test_where_no_task_reasons_the_mean_is_that_of_all() -> None:
    scores = {
        "scope": Scores(n=10, greedy=0.2, thought=0.0, length=5.0),
        "wording": Scores(n=10, greedy=0.4, thought=0.0, length=7.0),
    }
    assert table(scores, [])["mean"] == {"greedy": pytest.approx(0.3), "length": 6.0}
