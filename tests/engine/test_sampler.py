"""The sampler against a plain re-statement of each rule, and its draws against the probabilities they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from glasklar.engine.request import SamplingParams
from glasklar.engine.sampler import GOLDEN, Sampled, SpecialRow, _adjust, _mix, sample, truncate, uniform
from glasklar.errors import RequestError


def logits(rows: int, width: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


def choose(
    values: Tensor, params: SamplingParams, numbers: np.ndarray, prompt: Sequence[int] = (0,), made: Sequence[int] = ()
) -> Sampled:
    special = [SpecialRow(row, params, prompt, made) for row in range(len(values))] if params.special else []
    return sample(values, np.full(len(values), params.temperature), numbers, special)


def kept_by_rule(probs: list[float], k: int, p: float, m: float) -> set[int]:
    """Top-k, then the smallest set that holds p of what is left, then at least m of the best; one token at a time."""
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))[: k or None]
    total = sum(probs[i] for i in order)
    kept, mass = set(), 0.0
    for i in order:
        if kept and mass >= p * total:
            break
        kept.add(i)
        mass += probs[i]
    return {i for i in kept if probs[i] >= m * probs[order[0]]}


@pytest.mark.parametrize("k", [0, 1, 3, 500])
@pytest.mark.parametrize("p", [1.0, 0.8, 0.3, 0.0])
@pytest.mark.parametrize("m", [0.0, 0.05, 0.5, 1.0])
def test_truncation_against_rule_by_rule(k: int, p: float, m: float) -> None:
    values = logits(6, 40)
    values[5] = torch.tensor([1.0, 3.0] * 20)  # ties
    settings = torch.full((6,), k), torch.full((6,), p, dtype=torch.float64), torch.full((6,), m, dtype=torch.float64)
    for row, kept in zip(values, truncate(values, *settings), strict=True):
        assert set(kept.nonzero()[:, 0].tolist()) == kept_by_rule(row.double().softmax(0).tolist(), k, p, m)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Upper-tail probability, by the cube-root transformation (Wilson and Hilferty 1931)."""
    busy = expected > 5
    observed, wanted = np.append(counts[busy], counts[~busy].sum()), np.append(expected[busy], expected[~busy].sum())
    used = wanted > 0
    freedom = used.sum() - 1
    statistic = ((observed - wanted)[used] ** 2 / wanted[used]).sum()
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize("along", ["seeds", "positions"])
@pytest.mark.parametrize(("temperature", "truncated"), [(1.0, {}), (0.6, {}), (1.7, {"top_k": 9, "top_p": 0.9})])
def test_draws_follow_the_softmax(temperature: float, truncated: dict, along: str) -> None:
    n = 40_000
    row = logits(1, 24, seed=4)
    numbers = np.arange(n)
    fixed = np.full(n, 17)
    seeds, positions = (numbers, fixed) if along == "seeds" else (fixed, numbers)
    params = SamplingParams(temperature=temperature, **truncated)
    tokens = choose(row.expand(n, -1), params, uniform(seeds.astype(np.uint64), positions)).tokens
    probs = (row[0].double() / temperature).softmax(0)
    kept = kept_by_rule(probs.tolist(), params.top_k, params.top_p, 0.0)
    probs[[i for i in range(24) if i not in kept]] = 0
    counts = np.bincount(tokens, minlength=24)
    assert not counts[probs == 0].any()
    assert chi_square(counts, (probs / probs.sum()).numpy() * n) > 1e-3


def test_chi_square_sees_a_wrong_temperature() -> None:
    n = 40_000
    row = logits(1, 24, seed=4)
    tokens = choose(
        row.expand(n, -1), SamplingParams(temperature=1.05), uniform(np.arange(n).astype(np.uint64), np.zeros(n))
    )
    assert chi_square(np.bincount(tokens.tokens, minlength=24), row[0].double().softmax(0).numpy() * n) < 1e-6


def test_random_numbers_against_splitmix64_in_plain_integers() -> None:
    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    seeds, positions = [0, 1, 2**63, 2**64 - 1], [0, 5, 1 << 40, 99]
    wanted = [
        (mix(mix(s) + 0x9E3779B97F4A7C15 * (p + 1) & mask) >> 11) / 2**53 for s, p in zip(seeds, positions, strict=True)
    ]
    assert uniform(np.array(seeds, np.uint64), np.array(positions)).tolist() == wanted


def test_first_outputs_of_the_published_generator() -> None:
    """SplitMix64 from state 1234567 gives these first numbers (the reference vector of the generator's authors)."""
    state = np.full(3, 1234567, np.uint64) + GOLDEN * np.arange(1, 4, dtype=np.uint64)
    assert _mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_extreme_numbers_choose_existing_tokens() -> None:
    row = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]])
    numbers = np.array([0.0, 1 - 2.0**-53])
    assert choose(row.expand(2, -1), SamplingParams(temperature=1.0), numbers).tokens.tolist() == [1, 2]


def test_a_row_does_not_depend_on_its_company() -> None:
    values = logits(5, 64)
    numbers = uniform(np.arange(5, dtype=np.uint64), np.arange(5))
    settings = [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_p=0.7),
        SamplingParams(temperature=1.2, logit_bias={3: 4.0}, logprobs=2),
        SamplingParams(temperature=1.0, presence_penalty=1.0, min_p=0.1),
    ]
    special = [SpecialRow(i, p, [1, 2], [3]) for i, p in enumerate(settings) if p.special]
    together = sample(values, np.array([p.temperature for p in settings]), numbers, special)
    for i, params in enumerate(settings):
        alone = choose(values[i : i + 1], params, numbers[i : i + 1], [1, 2], [3])
        assert (alone.tokens[0], alone.logprobs[0]) == (together.tokens[i], together.logprobs[i])
        assert alone.alternatives.get(0) == together.alternatives.get(i)


def test_greedy_and_coldest_temperatures_take_the_best_token() -> None:
    values = logits(50, 30)
    numbers = uniform(np.arange(50, dtype=np.uint64), np.zeros(50))
    for temperature in (0.0, 1e-40, 1e-5):
        tokens = choose(values, SamplingParams(temperature=temperature, top_k=4), numbers).tokens
        assert tokens.tolist() == values.argmax(-1).tolist()


def test_bias_and_penalties_against_the_formula() -> None:
    row, prompt, made = logits(1, 8, seed=2), [1, 5], [5, 6, 6]
    params = SamplingParams(
        repetition_penalty=1.5, frequency_penalty=0.4, presence_penalty=0.7, logit_bias={2: 0.25}, logprobs=1
    )
    wanted = []
    for token, value in enumerate(row[0].tolist()):
        if token in prompt + made:
            value = value / 1.5 if value > 0 else value * 1.5
        wanted.append(value - 0.4 * made.count(token) - 0.7 * (token in made) + (0.25 if token == 2 else 0))
    (special,) = [SpecialRow(0, params, prompt, made)]
    np.testing.assert_allclose(_adjust(row, np.zeros(1), [special])[0], wanted, rtol=1e-6)
    found = choose(row, params, np.zeros(1), prompt, made)
    assert found.tokens[0] == int(np.argmax(wanted))
    # What is reported is the model's own distribution, whatever was done to choose.
    own = row[0].log_softmax(0)
    np.testing.assert_allclose(found.logprobs[0], own[found.tokens[0]], rtol=1e-5)
    assert found.alternatives[0][0][0] == int(own.argmax())


def test_rows_with_nan_or_infinity_are_named() -> None:
    values = logits(4, 12)
    values[1, 3] = float("nan")
    values[2, 0] = float("inf")
    for temperature in (0.0, 1.0):
        found = choose(values, SamplingParams(temperature=temperature), np.full(4, 0.5))
        assert found.finite.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("top_p", 1.1), ("max_tokens", 0), ("logprobs", 21),
     ("repetition_penalty", 0.0), ("logit_bias", {1: float("inf")})],
)  # fmt: skip
def test_senseless_settings_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_long_rows_are_chosen_from_alike_in_any_company_and_by_any_threads() -> None:
    """Where one row is long, sums of torch are shared out among threads, and end otherwise."""
    values, params = logits(160, 102_400, scale=3.0), SamplingParams(temperature=0.8, logprobs=3)
    numbers, found = np.random.default_rng(2).random(160), []
    before = torch.get_num_threads()
    try:
        for threads, company in ((1, 160), (2, 1), (3, 7)):
            torch.set_num_threads(threads)
            parts = [choose(values[i : i + company], params, numbers[i : i + company]) for i in range(0, 160, company)]
            rows = [(part, row) for part in parts for row in range(len(part.tokens))]
            found.append([(part.tokens[row], part.logprobs[row], part.alternatives[row]) for part, row in rows])
    finally:
        torch.set_num_threads(before)
    assert all(other == found[0] for other in found[1:])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stop_ids": (1 << 63,)}, "is no token's id"), ({"stop_ids": (-1,)}, "is no token's id"),
        ({"stop_ids": (None,)}, "whole number"), ({"stop_ids": 5}, "must be a tuple"),
        ({"logprobs": 2.5}, "logprobs = 2.5: must be a whole"), ({"max_tokens": 2.5}, "whole"),
        ({"seed": 1.5}, "whole"),
        ({"temperature": "1"}, "temperature = '1': must be a number"), ({"logit_bias": {3.5: 1.0}}, "whole"),
        ({"logit_bias": {3: 1e39}}, "within 1e\\+06 of 0"), ({"logit_bias": {3: math.nan}}, "within"),
    ],
)  # fmt: skip
def test_settings_of_a_wrong_kind_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**wrong)
