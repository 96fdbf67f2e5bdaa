"""Columns of running requests and the tensors made of them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from glasklar.engine.batch import Rows, decode_inputs, distinct, prefill_groups, prefill_inputs
from glasklar.engine.request import Request, SamplingParams
from glasklar.engine.shapes import rounded_length, rounded_rows


def request(number: int, prompt: int, limit: int, stops: tuple[int, ...] = ()) -> Request:
    params = SamplingParams(seed=number - 3, temperature=number / 10, stop_ids=stops)
    return Request(id=number, prompt=[number] * prompt, params=params, limit=limit)


def test_rounding_is_upward_stable_and_frugal() -> None:
    for n in range(1, 5000):
        length, rows = rounded_length(n), rounded_rows(n)
        assert n <= length <= max(n + 31, n * 9 / 8)
        assert n <= rows < max(2 * n, n + 32)
        assert (rounded_length(length), rounded_rows(rows)) == (length, rows)
        assert length <= rounded_length(n + 1)
        assert rows <= rounded_rows(n + 1)


def test_columns_follow_their_requests_through_moves() -> None:
    rows = Rows()
    rows.append([request(1, prompt=4, limit=3), request(2, prompt=9, limit=5, stops=(7,))])
    assert rows.record(np.arange(2), np.array([5, 6]), np.array([-0.5, -0.25], np.float32)).tolist() == [False, False]
    rows.append([request(3, prompt=2, limit=9, stops=(8, 9))])
    assert rows.longest == 10
    assert rows.record(np.arange(3), np.array([7, 7, 9]), np.array([-1.0, -2.0, -4.0], np.float32)).tolist() == [
        False,
        True,
        True,
    ]
    rows.move([(2, 0)], 2)
    assert [rows.answer(row) for row in range(2)] == [[9], [6, 7]]
    assert rows.logprobs[1, :2].tolist() == [-0.25, -2.0]
    assert rows.length[:2].tolist() == [3, 11]
    assert rows.seed[:2].tolist() == [0, 2**64 - 1]
    ids, position = decode_inputs(rows)
    assert (ids[:, 0].tolist(), position[:, 0].tolist()) == ([9, 7], [2, 10])
    rows.append([request(4, prompt=1, limit=1)])
    assert rows.answer(2) == []
    assert not (rows.stops[2] >= 0).any()


def test_prompts_are_padded_with_their_own_tokens() -> None:
    inputs = prefill_inputs([[1, 2, 3], [4], [5, 6]], most_rows=64)
    assert inputs.ids_BT.shape == (4, 32)
    assert inputs.ids_BT[:, :4].tolist() == [[1, 2, 3, 3], [4, 4, 4, 4], [5, 6, 6, 6], [1, 2, 3, 3]]
    assert inputs.segments_BT[:, :4].tolist() == [[0, 0, 0, -1], [0, -1, -1, -1], [0, 0, -1, -1], [0, 0, 0, -1]]
    assert inputs.last_B.tolist() == [2, 0, 1, 2]
    assert prefill_inputs([[1], [2], [3]], most_rows=3).ids_BT.shape == (3, 32)


@pytest.mark.parametrize("budget", [1, 64, 500])
def test_groups_cover_all_prompts_within_the_budget(budget: int) -> None:
    rng = random.Random(2)
    lengths = sorted(rng.randint(1, 200) for _ in range(40))
    groups = prefill_groups(lengths, budget)
    assert [i for start, stop in groups for i in range(start, stop)] == list(range(40))
    for start, stop in groups:
        assert stop - start == 1 or (stop - start) * rounded_length(max(lengths[start:stop])) <= budget


def test_distinct_prompts_keep_their_order() -> None:
    assert distinct([[2], [1], [2], [2, 1]]) == ([(2,), (1,), (2, 1)], [0, 1, 0, 2])
