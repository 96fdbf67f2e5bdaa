"""The slot cache: bytes counted from the real tensor, contents through growth, shrinking and moves, limits."""

from __future__ import annotations

import pytest
import torch

from glasklar.engine.cache import SlotCache
from glasklar.errors import CapacityError
from glasklar.model.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=8, hidden_size=8, num_hidden_layers=3, num_attention_heads=1, intermediate_size=8,
    kv_lora_rank=4, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=2,
)  # fmt: skip


def cache(max_tokens: int = 1 << 12, config: ModelConfig = CONFIG) -> SlotCache:
    return SlotCache(config, max_tokens=max_tokens, dtype=torch.bfloat16, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("layers", "fields", "wanted"),
    [
        (61, {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}, 70_272),  # V3
        (27, {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}, 31_104),
        (126, {"num_key_value_heads": 8, "head_dim": 128}, 516_096),  # Llama 3.1 405B
    ],
)
def test_bytes_per_token_of_published_shapes(layers: int, fields: dict[str, int], wanted: int) -> None:
    shape = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 8, "intermediate_size": 8}
    found = cache(config=ModelConfig(**shape, **fields, num_hidden_layers=layers))
    assert found.bytes_per_token == wanted
    found.fit(1, 1, keep=0)
    assert found.bytes_allocated == wanted * found.rows * found.length


def test_kept_slots_survive_growth_and_shrinking_and_the_rest_is_zero() -> None:
    slots = cache()
    slots.fit(2, 20, keep=0)
    slots.data.normal_()
    held = slots.data.clone()
    slots.fit(5, 70, keep=2)
    assert (slots.rows, slots.length) == (8, 96)
    assert slots.data[:, :2, :32].equal(held)
    assert not slots.data[:, 2:].any()
    assert not slots.data[:, :, 32:].any()
    slots.fit(1, 20, keep=1)
    assert slots.length == 32
    assert slots.data[:, :1].equal(held[:, :1])


def test_nothing_happens_while_it_fits() -> None:
    slots = cache()
    slots.fit(4, 60, keep=0)
    before = slots.data
    slots.fit(3, 40, keep=2)
    assert slots.data is before


def test_a_long_request_takes_the_room_of_many_short_ones() -> None:
    slots = cache(max_tokens=16 * 32)
    slots.fit(16, 32, keep=0)
    slots.fit(1, 500, keep=1)
    assert (slots.rows, slots.length) == (1, 512)
    with pytest.raises(CapacityError, match=r"2 slots of 512 tokens .* 512 tokens"):
        slots.fit(2, 500, keep=1)


def test_moves_and_copies_take_whole_slots() -> None:
    slots = cache()
    slots.fit(8, 32, keep=0)
    slots.data.normal_()
    held = slots.data.clone()
    slots.move([(6, 0), (7, 2)])
    assert slots.data[:, [0, 2, 1, 3]].equal(held[:, [6, 7, 1, 3]])
    held = slots.data.clone()
    slots.spread(2, [0, 0, 1, 2])
    assert slots.data[:, 2:6].equal(held[:, [2, 2, 3, 4]])
    slots.clear_from(3)
    assert not slots.data[:, 3:].any()
    assert slots.data[:, :3].any()
