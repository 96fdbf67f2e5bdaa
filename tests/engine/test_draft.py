"""Drafts: guesses from the text, the answers they leave alone, and the choice to make none."""

from __future__ import annotations

import random

import pytest

from glasklar.engine.cpu import library
from glasklar.engine.draft import KEEP, TRIAL, Gain, Lookup
from glasklar.engine.engine import Engine
from glasklar.engine.request import SamplingParams
from glasklar.model.config import ModelConfig
from glasklar.model.init import build, initialise

CONFIG = ModelConfig(
    vocab_size=7, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
    intermediate_size=48, initializer_range=0.3, num_key_value_heads=2, head_dim=8,
)  # fmt: skip


def naive(tokens: list[int], most: int) -> list[int]:
    """The longest end of 4, 3, 2 tokens that stood in the text before; the latest place."""
    for size in (4, 3, 2):
        for start in range(len(tokens) - size - 1, -1, -1):
            if len(tokens) > size and tokens[start : start + size] == tokens[-size:]:
                return tokens[start + size : start + size + most]
    return []


def test_guesses_are_those_of_a_plain_search() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        lookup, text = Lookup(), list[int]()
        for _ in range(30):
            more = [rng.randrange(4) for _ in range(rng.randint(1, 4))]
            text += more
            lookup.extend(more)
            assert lookup.guess(5) == naive(text, 5)


def measured(gain: Gain, plain: float, drafted: float, steps: int) -> list[bool]:
    ways = []
    for _ in range(steps):
        ways.append(gain.drafting)
        gain.note(1, 1 / (drafted if gain.drafting else plain))
    return ways


def test_drafting_stops_where_it_loses_and_is_tried_again() -> None:
    cycle = sum(TRIAL) + KEEP
    slow, fast = Gain(), Gain()
    for _ in range(2):
        assert measured(slow, plain=2.0, drafted=1.0, steps=cycle).count(True) == TRIAL[0]
        assert measured(fast, plain=1.0, drafted=2.0, steps=cycle).count(False) == TRIAL[1]
    assert slow.ratio == pytest.approx(0.5)
    assert fast.ratio == pytest.approx(2.0)


@pytest.mark.skipif(library.best() is None, reason="the C++ pass is not compiled here")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_are_the_same_with_and_without(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of seven repeats itself; some guesses hold, some do not; stop tokens and limits end in between."""
    monkeypatch.setattr(Gain, "drafting", True)
    network = initialise(build(CONFIG), 3)
    rng = random.Random(1)
    asked = [
        ([rng.randrange(7) for _ in range(rng.randint(1, 40))],
         SamplingParams(max_tokens=rng.randint(1, 90), temperature=temperature, seed=i, stop_ids=(6,) * (i % 2)))
        for i in range(24)
    ]  # fmt: skip
    prompts, params = [a for a, _ in asked], [b for _, b in asked]
    plain = Engine(network, native=True, draft_tokens=0).generate(prompts, params)
    engine = Engine(network, native=True, draft_tokens=5, max_slots=6)
    assert engine.generate(prompts, params) == plain
    assert 0 < engine.stats.accepted < engine.stats.drafted
    assert engine.stats.tokens == sum(len(done.ids) for done in plain)
    assert engine._lookups == {}


@pytest.mark.skipif(library.best() is None, reason="the C++ pass is not compiled here")
def test_each_answer_knows_its_own_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gain, "drafting", True)
    engine = Engine(initialise(build(CONFIG), 3), native=True, draft_tokens=5)
    requests = [engine.add([1, 2, 3, 1, 2, 3], SamplingParams(max_tokens=40, seed=i, temperature=0.5)) for i in (1, 2)]
    last = {}
    while engine.has_work:
        last |= {event.request: event for event in engine.step()}
    assert sum(last[r].drafted for r in requests) == engine.stats.drafted > 0
    assert sum(last[r].accepted for r in requests) == engine.stats.accepted > 0
