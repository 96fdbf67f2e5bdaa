"""Drafts: guesses from the text, the answers they leave alone, and the choice to make none."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from glasklar.engine.batch import Rows
from glasklar.engine.cpu import library
from glasklar.engine.draft import KEEP, PLAIN, PLAIN_TRIAL, TRIAL, Gain, Lookup, Way
from glasklar.engine.engine import Engine
from glasklar.engine.request import SamplingParams
from glasklar.engine.sampler import draw, uniform
from glasklar.model.attention import document_mask
from glasklar.model.config import ModelConfig
from glasklar.model.init import build, initialise

CONFIG = ModelConfig(
    vocab_size=7, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
    intermediate_size=48, initializer_range=0.3, num_key_value_heads=2, head_dim=8,
    num_nextn_predict_layers=1,
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


LOOK_UP, MODULE = Way("look-up", 5), Way("module", 1)


def measured(gain: Gain, speeds: dict[Way, float], steps: int) -> list[Way]:
    ways = []
    for _ in range(steps):
        ways.append(gain.way)
        gain.note(gain.way, 1, 1 / speeds[gain.way])
    return ways


def test_the_fastest_way_is_kept_and_all_are_tried_again() -> None:
    cycle = 2 * TRIAL + PLAIN_TRIAL + KEEP
    for speeds, best in (((2.0, 1.0, 1.5), PLAIN), ((1.0, 3.0, 2.0), LOOK_UP), ((1.0, 0.5, 2.0), MODULE)):
        gain = Gain([LOOK_UP, MODULE])
        by_way = dict(zip((PLAIN, LOOK_UP, MODULE), speeds, strict=True))
        for _ in range(2):
            ways = measured(gain, by_way, cycle)
            for way, trial in ((PLAIN, PLAIN_TRIAL), (LOOK_UP, TRIAL), (MODULE, TRIAL)):
                assert ways.count(way) == trial + (KEEP if way == best else 0)
        assert gain.ratio == pytest.approx(max(speeds[1:]) / speeds[0])


@pytest.mark.skipif(library.best() is None, reason="the C++ pass is not compiled here")
@pytest.mark.parametrize("way", [Way("look-up", 5), Way("module", 1), Way("module", 3)], ids=lambda way: way.source)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_are_the_same_with_and_without(temperature: float, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of seven repeats itself; some guesses hold, some do not; stop tokens and limits end in between.
    Every other request asks for more of the sampler than a temperature."""
    monkeypatch.setattr(Gain, "way", way)
    network = initialise(build(CONFIG), 3)
    rng = random.Random(1)
    asked = [
        ([rng.randrange(7) for _ in range(rng.randint(1, 40))],
         SamplingParams(max_tokens=rng.randint(1, 90), temperature=temperature, seed=i, stop_ids=(6,) * (i % 2),
                        logprobs=i % 2 * 3, top_p=0.9, presence_penalty=0.5 * (i % 3 == 0)))
        for i in range(24)
    ]  # fmt: skip
    prompts, params = [a for a, _ in asked], [b for _, b in asked]
    plain = Engine(network, native=True, draft_tokens=0).generate(prompts, params)
    engine = Engine(network, native=True, draft_tokens=5, max_slots=6)
    assert engine.drafter is not None
    assert engine.generate(prompts, params) == plain
    assert 0 < engine.stats.accepted < engine.stats.drafted
    assert engine.drafter.gain.tallies[way].accepted == engine.stats.accepted
    assert engine.stats.tokens == sum(len(done.ids) for done in plain)
    assert engine.drafter._lookups == {}


@pytest.mark.skipif(library.best() is None, reason="the C++ pass is not compiled here")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_guesses_of_the_module_are_those_of_the_network(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the module in PyTorch over the whole text, its draws with the same numbers."""
    monkeypatch.setattr(Gain, "way", Way("module", 1))
    network = initialise(build(CONFIG.replace(hidden_size=64)), 3)
    engine = Engine(network, native=True, max_slots=2)
    seen: dict[tuple[int, ...], int] = {}
    assert engine.drafter is not None
    draft = engine.drafter.runner.draft

    def noted(rows: Rows, most: Sequence[int]) -> list[list[int]]:
        guesses = draft(rows, most)
        for row, guess in enumerate(guesses):
            if guess:
                text = engine.scheduler.running[row].prompt + rows.answer(row)
                seen[(int(rows.seed[row]), *text)] = guess[0]
        return guesses

    monkeypatch.setattr(engine.drafter.runner, "draft", noted)
    rng = random.Random(2)
    prompts = [[rng.randrange(7) for _ in range(length)] for length in (1, 9, 30, 47)]
    engine.generate(prompts, [SamplingParams(max_tokens=40, temperature=temperature, seed=i) for i in range(4)])
    assert len(seen) > 60
    for (seed, *text), guess in list(seen.items())[::7]:
        ids_BT = torch.tensor([text])
        at = network.at(torch.arange(len(text))[None], document_mask(torch.zeros_like(ids_BT), torch.float32))
        states_BTD = network(ids_BT, at).hidden_BTD[:, :-1]
        at = network.at(
            torch.arange(len(text) - 1)[None], document_mask(torch.zeros_like(ids_BT[:, 1:]), torch.float32)
        )
        further_BTD, _ = network.mtp[0](states_BTD, network.embed_tokens(ids_BT[:, 1:]), at)
        logits_BW = network.logits(further_BTD[:, -1])
        number = uniform(np.array([seed], np.uint64), np.array([len(text)]))
        wanted = logits_BW.argmax() if temperature == 0 else draw(logits_BW / temperature, torch.from_numpy(number))
        assert guess == int(wanted)


@pytest.mark.skipif(library.best() is None, reason="the C++ pass is not compiled here")
def test_each_answer_knows_its_own_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gain, "way", Way("look-up", 5))
    engine = Engine(initialise(build(CONFIG), 3), native=True, draft_tokens=5)
    requests = [engine.add([1, 2, 3, 1, 2, 3], SamplingParams(max_tokens=40, seed=i, temperature=0.5)) for i in (1, 2)]
    last = {}
    while engine.has_work:
        last |= {event.request: event for event in engine.step()}
    assert sum(last[r].drafted for r in requests) == engine.stats.drafted > 0
    assert sum(last[r].accepted for r in requests) == engine.stats.accepted > 0
