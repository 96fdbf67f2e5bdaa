"""Our network against `transformers`: the same folder, the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel
from transformers.utils import logging

from glasklar.engine.engine import Engine
from glasklar.engine.paged_runner import lacking
from glasklar.engine.request import SamplingParams
from glasklar.model.attention import LayerCache, cache_mask, document_mask
from glasklar.model.checkpoint import load_model, save_model
from glasklar.model.config import ModelConfig
from glasklar.model.init import build, initialise
from glasklar.model.transformer import Transformer
from glasklar.ops.select import REFERENCE

VOCAB = 96
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
DEEPSEEK = {**COMMON, **LATENT, **EXPERTS}
LLAMA = {**COMMON, "num_key_value_heads": 2, "head_dim": 8, "rope_interleave": False}
SOFTMAX = {"scoring_func": "softmax", "norm_topk_prob": False}
# Prompts and answers run well beyond the 16 tokens of the original context.
YARN = {"factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
QWEN3 = {**LLAMA, "qk_norm": True}
QWEN3_MOE = {
    **QWEN3, "scoring_func": "softmax", "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
}  # fmt: skip
# One window of 9 tokens, which every prompt but the shortest leaves behind.
WINDOW = {"sliding_window": 9}
FULL, SLIDING = "full_attention", "sliding_attention"
GPT_OSS = {
    **LLAMA, "attention_bias": True, "output_bias": True, "attention_sinks": True, "scoring_func": "softmax",
    "n_routed_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 20, "moe_intermediate_size": 20,
    "swiglu_limit": 1.5, **WINDOW, "layer_types": [SLIDING, FULL, SLIDING],
}  # fmt: skip

CASES = {
    "deepseek": DEEPSEEK,
    "q_lora": {**DEEPSEEK, "q_lora_rank": 24},
    "groups": {**DEEPSEEK, "n_group": 4, "topk_group": 2},
    "two shared experts": {**DEEPSEEK, "n_shared_experts": 2},
    "no shared experts": {**DEEPSEEK, "n_shared_experts": 0},
    "gate not normalised": {**DEEPSEEK, "norm_topk_prob": False},
    "no dense layer": {**DEEPSEEK, "first_k_dense_replace": 0},
    "two dense layers": {**DEEPSEEK, "first_k_dense_replace": 2},
    "halves rotated": {**DEEPSEEK, "q_lora_rank": 24, "rope_interleave": False},
    "attention bias": {**DEEPSEEK, "q_lora_rank": 24, "attention_bias": True},
    "tied deepseek": {**DEEPSEEK, "tie_word_embeddings": True},
    "other eps": {**DEEPSEEK, "q_lora_rank": 24, "rms_norm_eps": 1e-2},
    "prediction module": {**DEEPSEEK, "num_nextn_predict_layers": 1},
    "yarn": {**DEEPSEEK, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn, V2's mscale": {**DEEPSEEK, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    "yarn, mscales differ": {**DEEPSEEK, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "yarn, no mscale_all_dim": {**DEEPSEEK, "rope_scaling": YARN},
    "yarn, other betas": {**DEEPSEEK, "rope_scaling": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5}},
    "V2": {**DEEPSEEK, **SOFTMAX, "routed_scaling_factor": 1.0},
    "V2, groups": {**DEEPSEEK, **SOFTMAX, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 4.0},
    "V2, q_lora and yarn": {
        **DEEPSEEK, **SOFTMAX, "q_lora_rank": 24, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "llama": LLAMA,
    "llama, tied": {**LLAMA, "tie_word_embeddings": True},
    "llama, one key head": {**LLAMA, "num_key_value_heads": 1},
    "llama, yarn": {**LLAMA, "rope_scaling": YARN},
    "llama, llama3's rope": {**LLAMA, "rope_scaling": LLAMA3},
    "llama, llama3's rope, tied": {**LLAMA, "rope_scaling": {**LLAMA3, "factor": 3.0}, "tie_word_embeddings": True},
    "qwen2": {**LLAMA, "attention_bias": True},
    "qwen2, tied": {**LLAMA, "attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen2, yarn": {**LLAMA, "attention_bias": True, "rope_scaling": YARN},
    "llama, biases": {**LLAMA, "attention_bias": True, "output_bias": True},
    "qwen2, window in later layers": {
        **LLAMA, "attention_bias": True, **WINDOW, "layer_types": [FULL, SLIDING, SLIDING],
    },
    "qwen3": QWEN3,
    "qwen3, biases, window": {
        **QWEN3, "attention_bias": True, "output_bias": True, **WINDOW, "layer_types": [SLIDING, FULL, SLIDING],
    },
    "qwen3, tied, wide heads": {**QWEN3, "tie_word_embeddings": True, "head_dim": 16},
    "qwen3, yarn": {**QWEN3, "rope_scaling": YARN},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe, not normalised": {**QWEN3_MOE, "norm_topk_prob": False},
    "qwen3_moe, yarn, tied": {**QWEN3_MOE, "rope_scaling": YARN, "tie_word_embeddings": True},
    "qwen3_moe, biases, window": {
        **QWEN3_MOE, "attention_bias": True, "output_bias": True, **WINDOW, "layer_types": [SLIDING] * 3,
    },
    "gpt_oss": GPT_OSS,
    "gpt_oss, its yarn": {**GPT_OSS, "rope_scaling": {**YARN, "truncate": False}},
    "gpt_oss, full attention, tied, other gate": {
        **GPT_OSS, "sliding_window": None, "layer_types": None, "tie_word_embeddings": True, "swiglu_alpha": 1.3,
    },
    "gpt_oss, without attention's biases, one key head, yarn with a factor": {
        **GPT_OSS, "attention_bias": False, "output_bias": False, "num_key_value_heads": 1,
        "rope_scaling": {**YARN, "attention_factor": 1.1},
    },
}  # fmt: skip


@pytest.fixture(params=CASES, ids=str)
def network(request) -> Transformer:
    config = ModelConfig.read(CASES[request.param], request.param)
    model = initialise(build(config), 5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bias", "_bias_EF", "_bias_ED")):
                # As large as differences between scores, so that the bias decides for some tokens.
                tensor.normal_(0.0, 0.1, generator=generator)
            elif name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5, generator=generator)
    return model.requires_grad_(False)


def load_theirs(folder: Path) -> torch.nn.Module:
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def our_logits(model: Transformer, ids_BT: Tensor) -> Tensor:
    position_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    at = model.at(position_BT, document_mask(torch.zeros_like(ids_BT), model.dtype))
    return model.logits(model(ids_BT, at).hidden_BTD)


def absorbed_logits(model: Transformer, ids_BT: Tensor) -> Tensor:
    """The same with attention over the cache: for MLA over the latents as they lie there."""
    B, T = ids_BT.shape
    position_BT = torch.arange(T).expand(B, T)
    at = model.at(position_BT, cache_mask(position_BT, T, model.dtype), torch.arange(T))
    rows = torch.zeros(B, T, model.config.cache_width)
    caches = [LayerCache(rows.clone(), position_BT) for _ in model.layers]
    return model.logits(model(ids_BT, at, caches, absorbed=True).hidden_BTD)


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in (5, 17, 40)]


@torch.inference_mode()
def test_logits_and_greedy_tokens_against_transformers(network, tmp_path):
    save_model(network, tmp_path / "model")
    theirs = load_theirs(tmp_path / "model")
    assert isinstance(theirs.config.model_type, str)
    ours = load_model(tmp_path / "model", dtype=torch.float32, ops=REFERENCE, device="cpu")
    given = prompts()
    longest = max(map(len, given))
    ids_BT, attended_BT = torch.zeros(len(given), longest, dtype=torch.long), torch.zeros(len(given), longest)
    for row, prompt in enumerate(given):
        ids_BT[row, : len(prompt)], attended_BT[row, : len(prompt)] = prompt, 1
    expected_BTW = theirs(input_ids=ids_BT, attention_mask=attended_BT.long()).logits
    assert expected_BTW.std() > 0.1, "the random model must tell tokens apart for this test to mean something"
    for prompt, expected_TW in zip(given, expected_BTW, strict=True):
        expected_TW = expected_TW[: len(prompt)]
        for logits in (our_logits, absorbed_logits):
            difference = (logits(ours, prompt[None])[0] - expected_TW).abs().max()
            assert difference < 1e-4 * expected_TW.abs().max()
    start = given[1][None]
    expected = theirs.generate(start, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    assert len(expected) == start.shape[1] + 64
    for native in {False, lacking(ours) is None}:
        [answer] = Engine(ours, native=native).generate(start.tolist(), SamplingParams(max_tokens=64, temperature=0.0))
        assert answer.ids == expected[start.shape[1] :].tolist()


@torch.inference_mode()
@pytest.mark.parametrize("depths", [1, 2])
def test_prediction_modules_against_transformers(depths, tmp_path, monkeypatch):
    """Depth k joins the state at i with the embedding of token i+k; the next depth begins where it ends."""
    fields = {**DEEPSEEK, "q_lora_rank": 24, "num_nextn_predict_layers": depths}
    model = initialise(build(ModelConfig.read(fields, "mtp")), 5).requires_grad_(False)
    save_model(model, tmp_path / "model")
    main = load_theirs(tmp_path / "model")
    # transformers knows the modules by the number of layers of the published model.
    first = model.config.num_hidden_layers
    pattern = rf"model\.layers\.({first}|{first + 1})\."
    monkeypatch.setattr(main, "_keys_to_ignore_on_load_unexpected", [pattern])
    theirs = MtpModel.from_pretrained(main).eval()
    ids_BT = torch.stack([prompt[:5] for prompt in prompts()])
    B, T = ids_BT.shape
    position_BT = torch.arange(T).expand(B, T)
    at = model.at(position_BT, document_mask(torch.zeros_like(ids_BT), model.dtype))
    ours = model(ids_BT, at).hidden_BTD
    expected = main.model(ids_BT).last_hidden_state
    for depth, module in enumerate(model.mtp):
        later_BT = ids_BT.roll(-1 - depth, dims=1)
        ours, _ = module(ours, model.embed_tokens(later_BT), at)
        expected = theirs.forward_layer(depth, expected, position_BT + 1, None, input_ids=later_BT)
        torch.testing.assert_close(model.logits(ours), main.lm_head(expected), rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.1


def test_families_say_what_they_are(tmp_path):
    """A folder of each family is opened by its own class, with nothing missing, and no end token made up."""
    kinds = {}
    for name in ("deepseek", "V2", "llama", "qwen2", "qwen3", "qwen3_moe", "gpt_oss"):
        save_model(initialise(build(ModelConfig.read(CASES[name], name)), 1), tmp_path / name)
        theirs = load_theirs(tmp_path / name)
        kinds[name] = type(theirs).__name__
        assert theirs.config.eos_token_id is None
        assert theirs.generation_config.eos_token_id is None
    assert kinds == {
        "deepseek": "DeepseekV3ForCausalLM",
        "V2": "DeepseekV2ForCausalLM",
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
        "gpt_oss": "GptOssForCausalLM",
    }


@torch.inference_mode()
@pytest.mark.parametrize(
    "name",
    [
        *("deepseek", "V2, groups", "yarn", "llama, tied", "llama, yarn", "llama, llama3's rope"),
        *("qwen2", "qwen2, window in later layers", "qwen3", "qwen3, biases, window", "qwen3_moe"),
        *("qwen3_moe, biases, window", "gpt_oss", "gpt_oss, its yarn"),
    ],
)
def test_folders_written_by_transformers_load(name, tmp_path):
    """The other way round: what transformers writes (fused, renamed and left-out keys and all) is read as it was."""
    model = initialise(build(ModelConfig.read(CASES[name], name)), 3).requires_grad_(False)
    save_model(model, tmp_path / "ours")
    load_theirs(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs", dtype=torch.float32, ops=REFERENCE, device="cpu")
    ids_BT = prompts()[2][None]
    assert torch.equal(our_logits(again, ids_BT), our_logits(model, ids_BT))
