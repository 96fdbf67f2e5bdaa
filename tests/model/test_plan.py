"""Plans against DeepSeek-V3's reported cost, and against arithmetic by hand."""

import json

import pytest

from glasklar.errors import RecipeError
from glasklar.model import cost
from glasklar.model.config import ModelConfig
from glasklar.model.plan import Hardware, StageBudget, Workload, decode_speed, plan_model, plan_stages
from glasklar.model.shapes import load_hardware, load_shape

V3_TOKENS, V3_HOURS = 14.8e12, 2_664_000  # arXiv 2412.19437, table 1
STABLE_KEYS = {
    "params_total", "params_active", "params_mtp", "params_embedding", "flops_per_token_train",
    "flops_per_token_prefill", "flops_per_token_decode", "cache_bytes_per_token", "memory_training_bytes",
    "memory_serving_bytes", "hours",
    "energy_kwh", "cost_usd", "hardware", "assumptions",
}  # fmt: skip


def v3() -> ModelConfig:
    return load_shape("deepseek-v3").config


def machine(**changes: object) -> Hardware:
    fields = {"name": "m", "description": "", "flops": 1e12, "mfu": 0.5, "memory_bytes": 10**9, "bandwidth": 1e10}
    fields |= {"mbu": 0.5, "layer_seconds": 0.0, "watts": 100.0, "usd_per_hour": 2.0}
    return Hardware.model_validate(fields | changes)


@pytest.mark.parametrize(("causal", "mfu"), [(True, 0.3894), (False, 0.4373)])
def test_v3_hours_from_tokens_and_either_reported_mfu(causal, mfu):
    """arXiv 2505.09343 counts the network without MTP, at 4096 tokens; both of its figures give the same hours."""
    flops = V3_TOKENS * cost.training_flops_per_token(v3(), 4096, causal=causal)
    hours = load_hardware("h800").replace(mfu=mfu).compute_hours(flops)
    assert hours == pytest.approx(V3_HOURS, rel=0.005)


def test_v3_plan_gives_the_papers_hours_and_money():
    plan = plan_model(v3(), load_hardware("h800"), tokens=V3_TOKENS)
    assert plan.hours == pytest.approx(V3_HOURS, rel=0.005)
    assert plan.cost_usd == pytest.approx(5.328e6, rel=0.005)
    assert plan.energy_kwh == pytest.approx(V3_HOURS * 0.7, rel=0.005)


def test_stages_by_hand():
    config, hardware = v3(), machine()
    work = Workload(context=64, rollouts=8)
    train, mtp = cost.training_flops_per_token(config, 64), cost.mtp_flops_per_token(config, 64)
    plan = plan_stages(
        config, [StageBudget("base", 1e6, "pretrain"), ("cold start", 1e3, "sft"), ("zero", 1e4, "rl")], hardware,
        workload=work,
    )  # fmt: skip
    base, sft, rl = plan.stages
    rate = 0.5e12 * 3600
    assert base.hours == pytest.approx(1e6 * (train + mtp) / rate)
    assert sft.hours == pytest.approx(1e3 * (train + mtp) / rate)
    decoding = 1e4 / decode_speed(config, hardware, context=64, sequences=8) / 3600
    assert rl.hours == pytest.approx(1e4 * train / rate + decoding)
    assert rl.flops == 1e4 * (train + cost.decode_flops_per_token(config, 64))
    assert plan.hours == base.hours + sft.hours + rl.hours
    assert plan.energy_kwh == pytest.approx(plan.hours * 0.1)
    assert plan.cost_usd == pytest.approx(plan.hours * 2)


def test_decoding_takes_the_slower_of_memory_and_arithmetic():
    config = load_shape("llama-3.1-8b").config
    read = cost.decode_bytes(config, context=100)
    work = cost.decode_flops_per_token(config, 100)
    assert decode_speed(config, machine(), context=100) == pytest.approx(5e9 / read)
    assert decode_speed(config, machine(bandwidth=1e15), context=100) == pytest.approx(5e11 / work)
    slow = machine(bandwidth=1e30, flops=1e30, layer_seconds=1e-3)
    assert decode_speed(config, slow, context=100, sequences=4) == pytest.approx(4 / (32 * 1e-3))


def test_plan_is_one_json_object_with_stable_keys():
    plan = plan_model(v3(), machine())
    table = json.loads(plan.model_dump_json())
    assert table.keys() >= STABLE_KEYS
    assert (table["hours"], table["energy_kwh"], table["cost_usd"]) == (None, None, None)
    assert table["hardware"] == "m"
    assert all(text.endswith(".") for text in table["assumptions"])


def test_plan_says_how_many_memories_it_takes():
    plan = plan_model(v3(), load_hardware("h800"), workload=Workload(bits_per_weight=8, context=128_000))
    assert plan.devices_serving == -(-(671_026_404_352 + 128_000 * 70_272) // 80_000_000_000)
    assert plan.devices_training == -(-plan.memory_training_bytes // 80_000_000_000)


def test_small_networks_get_a_warning():
    small = ModelConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8,
        intermediate_size=16,
    )  # fmt: skip
    warned = [
        any("small operations" in a for a in plan_model(c, machine(), tokens=1).assumptions) for c in (small, v3())
    ]
    assert warned == [True, False]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (("a", 1e6, "distill"), "stage 'a': kind = 'distill'; known kinds are pretrain, sft, distil, rl"),
        (("a", 0, "sft"), "stage 'a': tokens = 0; give a positive number"),
        (("a", float("inf"), "sft"), "stage 'a': tokens = inf; give a positive number"),
    ],
)
def test_impossible_stages_are_refused(stage, message):
    with pytest.raises(RecipeError, match=message):
        plan_stages(v3(), [stage], machine())


def test_stages_are_counted_in_rows_of_their_own_length() -> None:
    config, hardware = v3(), load_hardware("h800")
    for kind in ("pretrain", "sft", "rl"):
        [own] = plan_stages(config, [StageBudget("x", 1e9, kind, 256)], hardware).stages
        [short] = plan_stages(config, [StageBudget("x", 1e9, kind)], hardware, workload=Workload(context=256)).stages
        [long] = plan_stages(config, [StageBudget("x", 1e9, kind)], hardware).stages
        assert (own.flops, own.hours) == (short.flops, short.hours)
        assert own.flops < long.flops
