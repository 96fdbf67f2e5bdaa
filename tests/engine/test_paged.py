"""Pages of the cache: nothing lost, nothing written that is shared, the same bits with a known beginning as without."""

from __future__ import annotations

import random

import pytest
import torch

from glasklar.engine import paged
from glasklar.engine.cpu import library
from glasklar.engine.engine import Engine
from glasklar.engine.native_runner import NativeRunner
from glasklar.engine.paged import PAGE, PageCache, PageRoom
from glasklar.engine.request import Completion, SamplingParams
from glasklar.errors import CapacityError
from glasklar.model.config import ModelConfig
from glasklar.model.init import build, initialise
from glasklar.model.transformer import Transformer

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 192, "intermediate_size": 48, "initializer_range": 0.3}  # fmt: skip
MLA = ModelConfig(
    **SIZES, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10,
    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1,
)  # fmt: skip
GQA = ModelConfig(**SIZES, num_key_value_heads=2, head_dim=8)

needs_compiler = pytest.mark.skipif(library.best() is None, reason="the C++ pass is not compiled here")


def cache(tokens: int = 160) -> PageCache:
    return PageCache(MLA, max_tokens=tokens, dtype=torch.bfloat16)


def native(config: ModelConfig, dtype: torch.dtype = torch.bfloat16, **settings: int) -> tuple[Engine, PageCache]:
    engine = Engine(network(config, dtype), native=True, **settings)
    assert isinstance(engine.runner, NativeRunner)
    return engine, engine.runner.cache


def network(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    return initialise(build(config, dtype=dtype), 3)


def opened(pages: PageCache, row: int, tokens: list[int]) -> int:
    known = pages.begin(row, tokens)
    pages.reach(row, len(tokens))
    pages.publish(row, tokens)
    return known


def test_a_prompt_finds_what_an_earlier_one_left_whole_pages_at_a_time() -> None:
    pages, first = cache(), list(range(40))
    assert opened(pages, 0, first) == 0
    pages.release(0)
    assert pages.pages_used == 2  # full ones; the third was half empty
    assert opened(pages, 0, [*first, 5, 6]) == 32
    assert opened(pages, 1, first[:32]) == 16  # one token is always left to compute
    assert opened(pages, 2, [9, *first[1:]]) == 0
    pages.check()


def test_copies_share_full_pages_and_own_the_one_they_go_on_writing() -> None:
    pages, prompt = cache(), list(range(PAGE + 5))
    opened(pages, 0, prompt)
    pages.data[:, int(pages.tables[0, 1])] = 7.0
    pages.fork(0, 1, len(prompt))
    assert pages.tables[0, 0] == pages.tables[1, 0]
    assert pages.tables[0, 1] != pages.tables[1, 1]
    assert torch.equal(pages.data[:, int(pages.tables[1, 1])], pages.data[:, int(pages.tables[0, 1])])
    pages.check()


def test_room_is_made_by_what_was_unused_longest_and_never_by_what_runs() -> None:
    pages = cache(4 * PAGE)
    for start in (0, 20, 40):
        opened(pages, 0, list(range(start, start + PAGE)))
        pages.release(0)
    assert opened(pages, 0, [*range(PAGE), 60]) == PAGE  # used again: now the youngest
    opened(pages, 1, [50] * 2 * PAGE)  # takes the place of the page from 20 on, then of that from 40 on
    pages.check()
    with pytest.raises(CapacityError, match="64 tokens"):
        pages.reach(1, 3 * PAGE)
    pages.release(0)
    pages.release(1)
    assert pages.begin(0, [*range(20, 20 + PAGE), 60]) == 0
    assert pages.begin(1, [*range(PAGE), 60]) == PAGE
    pages.check()


def test_memory_for_prompts_to_come_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = cache()
    monkeypatch.setattr(paged, "KEPT_BYTES", 3 * PAGE * pages.bytes_per_token)
    opened(pages, 0, list(range(6 * PAGE)))
    pages.release(0)
    assert pages.pages_used == 3
    pages.check()


def test_forgetting_leaves_running_rows_their_pages() -> None:
    pages = cache()
    opened(pages, 0, list(range(2 * PAGE)))
    pages.forget()
    assert pages.pages_used == 2
    pages.check()
    pages.release(0)
    assert pages.pages_used == 0
    pages.check()


def test_room_counts_a_page_that_each_request_leaves_half_empty() -> None:
    room = PageRoom(max_slots=8, max_tokens=10 * PAGE)
    pages = cache(10 * PAGE)
    for lengths in ((1,) * 8, (17, 17, 33), (PAGE,) * 7, (150,), (81, 79)):
        if room.fits(len(lengths), max(lengths), sum(lengths)):
            for row, length in enumerate(lengths):
                pages.begin(row, [1] * length)
                pages.reach(row, length)
            for row in range(len(lengths)):
                pages.release(row)
    assert not room.fits(1, 161, 161)
    assert not room.fits(9, 1, 9)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [MLA, GQA], ids=["mla", "gqa"])
@pytest.mark.parametrize(
    "seeds", [range(20), pytest.param(range(20, 150), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_mixes_of_requests_are_the_bits_of_each_alone(config: ModelConfig, dtype: torch.dtype, seeds: range) -> None:
    """Ids and log-probabilities, whatever arrives, is cancelled, begins alike, is read in pieces or waits for room."""
    for seed in seeds:
        rng = random.Random(seed)
        engine, pages = native(
            config, dtype, draft_tokens=rng.choice((0, 3, 7)), max_slots=rng.choice((2, 5, 9)),
            max_tokens=rng.choice((192, 320, 2048)),
            chunk_tokens=rng.choice((3, 16, 25, 512)),
        )  # fmt: skip
        begins = [[rng.randrange(61) for _ in range(rng.randrange(70))] for _ in range(3)]
        asked, done, ids = [], {}, []
        for i in range(12):
            prompt = [*rng.choice(begins), *(rng.randrange(61) for _ in range(rng.randint(1, 30)))]
            settings = SamplingParams(
                max_tokens=rng.randint(1, 25), temperature=rng.choice((0.0, 0.7, 1.2)), seed=i, stop_ids=(7,),
                top_k=rng.choice((0, 0, 4)),
            )  # fmt: skip
            asked += [(prompt, settings)] * rng.choice((1, 1, 3))
        while engine.has_work or len(ids) < len(asked):
            arrivals = min(rng.randrange(4), len(asked) - len(ids))
            ids += [engine.add(*asked[len(ids) + i]) for i in range(arrivals)]
            for made in engine._advance():
                done |= {made.requests[i].id: completion for i, completion in made.completions.items()}
            if rng.random() < 0.1 and ids:
                engine.cancel(rng.choice(ids))
            pages.check()
        assert len(done) > len(asked) / 3
        for number, completion in list(done.items())[:: max(1, len(done) // 6)]:
            assert alone(config, dtype, *asked[ids.index(number)]) == completion
        assert not pages._held.any()
        pages.forget()
        assert pages.pages_used == 0


def alone(config: ModelConfig, dtype: torch.dtype, prompt: list[int], params: SamplingParams) -> Completion:
    [completion] = native(config, dtype, max_slots=1, draft_tokens=0)[0].generate([prompt], params)
    return completion
