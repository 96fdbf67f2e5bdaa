"""Pages of the cache alone: nothing lost, nothing written that is shared, bytes counted. With requests: test_mixes."""

from __future__ import annotations

import pytest
import torch

from glasklar.engine import paged
from glasklar.engine.paged import PAGE, PageCache, PageRoom
from glasklar.errors import CapacityError
from glasklar.model.config import ModelConfig
from glasklar.model.shapes import load_shape

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 192, "intermediate_size": 48, "initializer_range": 0.3}  # fmt: skip
MLA = ModelConfig(
    **SIZES, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10,
    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1,
)  # fmt: skip


def cache(tokens: int = 160) -> PageCache:
    return PageCache(MLA, max_tokens=tokens, dtype=torch.bfloat16)


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
    for lengths, fits in (
        ((1,) * 8, True), ((17, 17, 33), True), ((PAGE,) * 4, True), ((PAGE,) * 6, False), ((150,), True),
        ((81, 79), False),
    ):  # fmt: skip
        assert room.fits(len(lengths), max(lengths), sum(lengths)) == fits, lengths
        if fits:
            for row, length in enumerate(lengths):
                pages.begin(row, [1] * length)
                pages.reach(row, length)
            for row in range(len(lengths)):
                pages.release(row)
    assert not room.fits(1, 161, 161)
    assert not room.fits(9, 1, 9)


@pytest.mark.parametrize(
    ("shape", "wanted"), [("deepseek-v3", 70_272), ("deepseek-v2-lite", 31_104), ("llama-3.1-405b", 516_096)]
)
def test_bytes_per_token_of_published_shapes(shape: str, wanted: int) -> None:
    """Counted in the cache's own memory."""
    pages = PageCache(load_shape(shape).config, max_tokens=4 * PAGE, dtype=torch.bfloat16)
    assert pages.bytes_per_token == wanted
    assert pages.data.untyped_storage().nbytes() == 4 * PAGE * wanted
    opened(pages, 0, [1] * (PAGE + 1))
    assert pages.bytes_allocated == 2 * PAGE * wanted


def test_of_one_text_the_end_is_given_up_first() -> None:
    pages = cache(4 * PAGE)
    text = list(range(3 * PAGE))
    opened(pages, 0, text)
    pages.release(0)
    opened(pages, 1, [60] * 2 * PAGE)  # one page is free, one must be given up
    pages.release(1)
    assert pages.begin(0, [*text, 1]) == 2 * PAGE
    pages.check()
