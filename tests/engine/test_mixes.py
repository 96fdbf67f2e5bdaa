"""Random mixes of requests. Oracle for every logit: the request's text alone, in one pass over an empty cache; for its
tokens: an engine that does nothing else. On a GPU with GLASKLAR_TEST_DEVICE=cuda."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from glasklar.engine.cpu import library
from glasklar.engine.cpu.library import CacheKind
from glasklar.engine.cuda_network import CudaNetwork, kernels
from glasklar.engine.draft import PLAIN, Gain, Way
from glasklar.engine.engine import Engine
from glasklar.engine.guide import Guide, ThinkingBudget
from glasklar.engine.native import NativeNetwork
from glasklar.engine.packed import KINDS, PackedModel, Packer, pack
from glasklar.engine.paged_runner import PagedRunner
from glasklar.engine.request import Completion, SamplingParams
from glasklar.engine.runner import Result
from glasklar.engine.spill import SpillConfig
from glasklar.model.config import ModelConfig
from glasklar.model.init import build, initialise
from glasklar.model.transformer import Transformer

W = 61
SIZES = {"vocab_size": W, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 192, "intermediate_size": 48, "initializer_range": 0.3}  # fmt: skip
MLA = ModelConfig(
    **SIZES, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10,
    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1,
    num_nextn_predict_layers=1,
)  # fmt: skip
GQA = ModelConfig(**SIZES, num_key_value_heads=2, head_dim=8)
WAYS = (PLAIN, Way("look-up", 4), Way("module", 1), Way("module", 3))
Asked = tuple[list[int], SamplingParams, int, int]  # prompt, settings, priority, budget of a guide (0: no guide)
GPU = os.environ.get("GLASKLAR_TEST_DEVICE") == "cuda"
PRECISIONS = ("float32", "bfloat16") if GPU else tuple(KINDS)
pytestmark = pytest.mark.skipif(library.best() is None and not GPU, reason="the C++ pass is not compiled here")


@functools.cache
def ready(name: str, kind: str) -> Transformer | PackedModel:
    dtype = torch.float32 if GPU and kind == "float32" else torch.bfloat16
    model = initialise(build({"mla": MLA, "gqa": GQA}[name], dtype=dtype), 3)
    if GPU:
        return model.requires_grad_(False).cuda()
    compiled = library.best()
    assert compiled is not None
    return pack(model.config, dict(model.state_dict()).__getitem__, Packer(compiled, KINDS[kind], 1), draft=True)


@functools.cache
def lonely(name: str, kind: str, cache: CacheKind | None) -> NativeNetwork | CudaNetwork:
    compiled, model = library.best(), ready(name, kind)
    if not isinstance(model, PackedModel):
        ops = kernels()
        assert ops is not None
        return CudaNetwork(model, ops)
    assert compiled is not None
    cache = cache or ("float32" if kind == "float32" else "int16")
    return NativeNetwork(compiled, model, threads=1, cache=cache)


def logits_alone(name: str, kind: str, cache: CacheKind | None, text: list[int]) -> NDArray[np.float32]:
    """After each token of a text."""
    net, count = lonely(name, kind, cache), len(text)
    every, zeros = np.arange(count, dtype=np.int32), np.zeros(count)
    tables = np.arange(-(-count // 16), dtype=np.int32)[None]
    logits, _, _ = net.run(
        net.new_cache(tables.size), np.array(text, np.int32), every, np.zeros(count, np.int32), tables, every,
        zeros.astype(np.float32), zeros,
    )  # fmt: skip
    return logits.cpu().numpy()


def guide_of(budget: int) -> Guide | None:
    return ThinkingBudget(budget, open_id=5, close_id=6, vocabulary=W, within=True) if budget else None


def draw_requests(rng: random.Random) -> list[Asked]:
    """Prompts that often begin alike, some long, some several times; settings of all kinds."""
    begins = [[rng.randrange(W) for _ in range(rng.randrange(90))] for _ in range(3)]
    asked: list[Asked] = []
    for seed in range(rng.randint(5, 12)):
        prompt = [*rng.choice(begins), *(rng.randrange(W) for _ in range(rng.randint(1, 40)))]
        params = SamplingParams(
            max_tokens=rng.choice((1, 8, 25, 60)), temperature=rng.choice((0.0, 0.7, 1.2)), seed=seed, stop_ids=(7,),
            top_k=rng.choice((0, 0, 4)), top_p=rng.choice((1.0, 1.0, 0.8)), min_p=rng.choice((0.0, 0.0, 0.1)),
            presence_penalty=rng.choice((0.0, 0.0, 0.7)), logprobs=rng.choice((0, 0, 5)),
            logit_bias={3: 2.0} if rng.random() < 0.2 else {},
        )  # fmt: skip
        request = (prompt, params, rng.choice((0, 0, 1, 5)), rng.choice((0, 0, 0, 4)))
        asked += [request] * rng.choice((1, 1, 1, 3))
    return asked


class Recorded:
    """An engine whose logits are written down: request -> length of the text -> logits of the next token."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.logits: dict[int, dict[int, NDArray[np.float32]]] = {}
        choose = engine._choose

        def noted(result: Result, places: NDArray[np.int64]) -> object:
            for i, row in enumerate(places.tolist()):
                request, length = engine.scheduler.running[row], int(engine.rows.length[row])
                self.logits.setdefault(request.id, {})[length] = result.logits_BW[i].cpu().numpy().copy()
            return choose(result, places)

        engine._choose = noted  # type: ignore[method-assign, assignment]


def alone(model: Transformer | PackedModel, cache: CacheKind | None, request: Asked) -> Completion:
    engine = Engine(model, max_slots=1, draft_tokens=0, cache=cache)
    prompt, params, _, budget = request
    engine.add(prompt, params, guide=guide_of(budget))
    while True:
        for made in engine._advance():
            if made.completions:
                return made.completions[0]


def run_mix(seed: int, folder: Path) -> Engine:
    rng = random.Random(seed)
    name, kind = rng.choice(("mla", "gqa")), rng.choice(PRECISIONS)
    cache: CacheKind | None = "int8" if seed % 3 == 1 and not GPU else None
    model, asked = ready(name, kind), draw_requests(rng)
    engine = Engine(
        model, draft_tokens=rng.choice((0, 4, 4)), max_slots=rng.choice((2, 5, 12)),
        max_tokens=rng.choice((192, 192, 320, 2048)), chunk_tokens=rng.choice((3, 16, 25, 512)),
        cache=cache,
        spill=SpillConfig(folder=folder, model=kind + name) if rng.random() < 0.3 else None,
    )  # fmt: skip
    assert isinstance(engine.runner, PagedRunner)
    recorded, pages = Recorded(engine), engine.runner.cache
    ids: list[int] = []
    answers: dict[int, list[int]] = {}
    done: dict[int, Completion] = {}
    while engine.has_work or len(ids) < len(asked):
        for prompt, params, priority, budget in asked[len(ids) : len(ids) + rng.randrange(4)]:
            ids.append(engine.add(prompt, params, priority, guide_of(budget)))
        for made in engine._advance():
            assert not made.errors
            assert made.sampled is not None
            for request, token in zip(made.requests, made.sampled.tokens.tolist(), strict=True):
                answers.setdefault(request.id, []).append(token)
            done |= {made.requests[i].id: completion for i, completion in made.completions.items()}
        if rng.random() < 0.08 and ids:
            engine.cancel(rng.choice(ids))
        pages.check()
    for number, answer in answers.items():
        prompt = asked[ids.index(number)][0]
        wanted = logits_alone(name, kind, cache, prompt + answer[:-1])
        assert sorted(recorded.logits[number]) == list(range(len(prompt), len(prompt) + len(answer)))
        for length, logits in recorded.logits[number].items():
            assert np.array_equal(logits, wanted[length - 1]), (seed, number, length)
    for number in rng.sample(sorted(done), min(2, len(done))):
        assert alone(model, cache, asked[ids.index(number)]) == done[number]
    assert not pages._held.any()
    assert engine.drafter is not None
    assert not engine.drafter._lookups
    assert not engine._alternatives
    engine.close()
    pages.forget()
    assert pages.pages_used == 0
    pages.check()
    return engine


@pytest.fixture
def any_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another way to draft in every step, and room set aside for one token only: more must give way."""
    monkeypatch.setattr("glasklar.engine.paged.AHEAD", 1)

    def way(gain: Gain) -> Way:
        ways = [way for way in WAYS if way in gain.tallies]
        return ways[gain._step * 7 // 3 % len(ways)]

    monkeypatch.setattr(Gain, "way", property(way))


@pytest.mark.parametrize(
    "seeds", [range(25), pytest.param(range(25, 500), marks=pytest.mark.slow)], ids=["25", "475 more"]
)
@pytest.mark.usefixtures("any_way")
def test_every_logit_of_a_mix_is_that_of_the_request_alone(seeds: range, tmp_path: Path) -> None:
    engines = [run_mix(seed, tmp_path) for seed in seeds]
    assert sum(engine.stats.preempted for engine in engines) > len(seeds) / 5
    assert sum(engine.stats.accepted for engine in engines) > len(seeds)
    spills = [engine.runner.cache.spill for engine in engines if isinstance(engine.runner, PagedRunner)]
    assert sum(spill.found for spill in spills if spill is not None) > 0
