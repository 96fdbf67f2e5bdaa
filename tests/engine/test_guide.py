"""Guides: a budget closes the thinking, a mask holds, a dead end fails alone."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from glasklar.engine.cpu import library
from glasklar.engine.engine import Engine
from glasklar.engine.guide import Guide, ThinkingBudget
from glasklar.engine.request import SamplingParams, TokenEvent
from glasklar.errors import GlasklarError, RequestError
from glasklar.model.config import ModelConfig
from glasklar.model.init import build, initialise

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=96,
    intermediate_size=48, initializer_range=0.3, num_key_value_heads=2, head_dim=8,
)  # fmt: skip
OPEN, CLOSE = 58, 59


class Listed:
    """Allows the tokens of one set at each place."""

    def __init__(self, *sets: set[int]) -> None:
        self.sets, self.seen = sets, list[int]()

    def allowed(self) -> NDArray[np.bool_]:
        return np.isin(np.arange(61), list(self.sets[len(self.seen)]))

    def accept(self, token: int) -> None:
        self.seen.append(token)


@pytest.fixture(params=[True, False], ids=["C++", "torch"])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param and library.best() is None:
        pytest.skip("the C++ pass is not compiled here")
    return Engine(initialise(build(CONFIG), 3), native=request.param)


def run(engine: Engine, asked: list[tuple[list[int], SamplingParams, Guide | None]]) -> list[list[TokenEvent]]:
    ids = [engine.add(prompt, params, guide=guide) for prompt, params, guide in asked]
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step()
    return [[event for event in events if event.request == number] for number in ids]


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_only_allowed_tokens_come_and_neighbours_are_untouched(engine: Engine, temperature: float) -> None:
    params = SamplingParams(max_tokens=4, temperature=temperature, seed=5)
    [free] = run(engine, [([1, 2], params, None)])
    guide = Listed({3, 4}, {9}, {5, 6, 7}, {1})
    guided, beside = run(engine, [([1, 2], params, guide), ([1, 2], params, None)])
    assert [event.token for event in guided] == guide.seen
    assert all(event.token in allowed for event, allowed in zip(guided, guide.sets, strict=True))
    assert [event.token for event in beside] == [event.token for event in free]


class Failing(Listed):
    """Raises where it is asked, or told, for the `turn`-th time."""

    def __init__(self, method: str, turn: int) -> None:
        super().__init__(*[set(range(61))] * 9)
        self.method, self.turn = method, turn

    def _called(self, method: str) -> None:
        if method == self.method and len(self.seen) == self.turn:
            raise ValueError("no")

    def allowed(self) -> NDArray[np.bool_]:
        self._called("allowed")
        mask = super().allowed()
        return mask[:-1] if self.method == "mask" and len(self.seen) == self.turn else mask

    def accept(self, token: int) -> None:
        self._called("accept")
        super().accept(token)


@pytest.mark.parametrize(
    ("method", "turn", "message"),
    [("allowed", 0, "no"), ("allowed", 2, "no"), ("accept", 1, "no"), ("mask", 1, r"bool\[60\].*bool\[61\]")],
)
@pytest.mark.parametrize("length", [2, 50])
def test_a_guide_that_fails_ends_its_request_alone(
    engine: Engine, method: str, turn: int, message: str, length: int
) -> None:
    params = SamplingParams(max_tokens=5, temperature=0.0)
    if engine.chunk_tokens is not None:
        engine.chunk_tokens = 16
    [free] = run(engine, [([3, 4], params, None)])
    failed, beside = run(engine, [([1] * length, params, Failing(method, turn)), ([3, 4], params, None)])
    assert [event.token for event in beside] == [event.token for event in free]
    assert [event.finish for event in failed] == [None] * (len(failed) - 1) + ["error"]
    assert len(failed) == turn + 1 + (method == "accept")
    with pytest.raises(GlasklarError, match=f"its guide failed .*{message}"):
        raise failed[-1].error or AssertionError


def test_where_nothing_is_allowed_the_request_fails_and_others_go_on(engine: Engine) -> None:
    params = SamplingParams(max_tokens=3)
    guided, beside = run(engine, [([1], params, Listed({4}, set())), ([1], params, None)])
    assert [event.token for event in guided] == [4, -1]
    assert isinstance(guided[-1].error, RequestError)
    assert "guide" in str(guided[-1].error)
    assert len(beside) == 3
    assert beside[-1].finish == "length"


def test_a_bias_cannot_bring_in_what_is_not_allowed(engine: Engine) -> None:
    params = SamplingParams(max_tokens=1, logit_bias={7: 100.0})
    [[event]] = run(engine, [([1], params, Listed({3}))])
    assert event.token == 3


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_thinking_ends_at_its_budget(engine: Engine, tokens: int) -> None:
    """Inside the thinking from the start; the model is kept from closing it by itself."""
    budget = ThinkingBudget(tokens, open_id=OPEN, close_id=CLOSE, vocabulary=61, within=True)
    params = SamplingParams(max_tokens=9, logit_bias={CLOSE: -100.0})
    [events] = run(engine, [([1, OPEN], params, budget)])
    made = [event.token for event in events]
    assert made[tokens] == CLOSE
    assert made.count(CLOSE) == 1
    [free] = run(engine, [([1, OPEN], params, None)])
    assert made[:tokens] == [event.token for event in free][:tokens]


def test_a_budget_waits_for_the_thinking_and_ends_with_it() -> None:
    budget = ThinkingBudget(2, open_id=OPEN, close_id=CLOSE, vocabulary=61, within=False)
    for token in (1, 2, 3, 4, OPEN, 5, CLOSE, 6, 7, 8):
        assert budget.allowed() is None
        budget.accept(token)
    for token in (OPEN, 9):
        budget.accept(token)
    mask = budget.allowed()
    assert mask is not None
    assert np.flatnonzero(mask).tolist() == [CLOSE]


def test_what_the_cache_had_is_reported(engine: Engine) -> None:
    params, prompt = SamplingParams(max_tokens=2), list(range(40))
    [first] = run(engine, [(prompt, params, None)])
    again, copy = run(engine, [(prompt, params, None), (prompt, params, None)])
    native = library.best() is not None and type(engine.runner).__name__ == "PagedRunner"
    assert {event.cached for event in first} == {0}
    assert {event.cached for event in again} == {32 if native else 0}
    assert {event.cached for event in copy} == {40 if native else 0}
