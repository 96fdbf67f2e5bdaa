"""Weights in fp8 blocks and mxfp4 as they are published, against transformers' own reading and the papers' formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glasklar.convert.export import convert
from glasklar.engine.cpu import library
from glasklar.engine.engine import Engine
from glasklar.engine.packed import KINDS, Packer, pack
from glasklar.engine.request import SamplingParams
from glasklar.errors import CheckpointError, RequestError
from glasklar.loading import load
from glasklar.model import quantised
from glasklar.model.checkpoint import hf_tensors, load_model, save_model
from glasklar.model.config import ModelConfig
from glasklar.model.init import build, initialise
from glasklar.model.transformer import Transformer
from glasklar.ops.select import REFERENCE
from glasklar.runtime import Runtime

BLOCK = (16, 32)  # rows and columns that share a scale: sizes below are no multiples of it
V3 = {
    "vocab_size": 96, "hidden_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 56,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "q_lora_rank": 24,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "max_position_embeddings": 128,
    "initializer_range": 0.15,
}  # fmt: skip
GPT_OSS = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "rope_interleave": False, "attention_bias": True, "output_bias": True, "attention_sinks": True,
    "scoring_func": "softmax", "n_routed_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32,
    "moe_intermediate_size": 32, "swiglu_limit": 7.0, "sliding_window": 8, "max_position_embeddings": 128,
    "layer_types": ["sliding_attention", "full_attention"], "initializer_range": 0.15,
}  # fmt: skip


def random_model(fields: dict) -> Transformer:
    model = initialise(build(ModelConfig.read(fields, "case")), 5).requires_grad_(False)
    for name, tensor in model.named_parameters():
        if name.endswith(("bias", "_bias_EF", "_bias_ED")):
            tensor.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def rewrite(folder: Path, tensors: dict[str, Tensor], quantization: dict) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def fp8_folder(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A folder as DeepSeek publishes them, and what its matrices stand for: numbers in e4m3 times the block's scale."""
    save_model(random_model(V3), folder)
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        if tensor.ndim != 2 or "embed" in name or "head" in name or ".gate." in name or "eh_proj" in name:
            tensors[name] = tensor if ".gate." in name else tensor.bfloat16()
            meant[name] = tensors[name].float()
            continue
        high, wide = BLOCK
        scales = torch.empty(math.ceil(tensor.shape[0] / high), math.ceil(tensor.shape[1] / wide))
        small, wanted = torch.empty_like(tensor, dtype=torch.float8_e4m3fn), torch.empty_like(tensor)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                place = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
                scales[i, j] = tensor[place].abs().max() / 448
                small[place] = (tensor[place] / scales[i, j]).to(torch.float8_e4m3fn)
                wanted[place] = small[place].to(torch.float32) * scales[i, j]
        tensors |= {name: small, f"{name}_scale_inv": scales}
        meant[name] = wanted
    rewrite(folder, tensors, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)})
    return folder, meant


def mxfp4_folder(folder: Path) -> Path:
    """A folder as OpenAI publishes them: random codes and powers of two for the experts."""
    save_model(random_model(GPT_OSS), folder)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3)
    for name, tensor in list(tensors.items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            E, inputs, outputs = tensor.shape
            del tensors[name]
            codes = torch.randint(256, (E, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
            powers = torch.randint(122, 126, (E, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
            tensors |= {f"{name}_blocks": codes, f"{name}_scales": powers}
        else:
            tensors[name] = tensor if "router" in name else tensor.bfloat16()
    rewrite(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder


def test_fp8_in_bf16_out_is_the_reference_dequantisation(tmp_path: Path) -> None:
    folder, meant = fp8_folder(tmp_path / "fp8")
    loaded = hf_tensors(load_model(folder, dtype=torch.float32, ops=REFERENCE, device="cpu"))
    assert loaded.keys() == meant.keys()
    assert all(torch.equal(loaded[name], wanted) for name, wanted in meant.items())
    convert(folder, tmp_path / "out", to="hf", dtype="bf16", name="m")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == meant.keys()
    for name, wanted in meant.items():
        assert torch.equal(written[name], wanted if ".gate." in name else wanted.bfloat16()), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_fp8_blocks_against_transformers() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(1)
    small, scale = torch.randn(256, 384).to(torch.float8_e4m3fn), torch.rand(2, 3)
    theirs = Fp8Dequantize(None)._dequantize_one(small, scale, torch.bfloat16)
    stored = {"w": small, "w_scale_inv": scale}
    assert torch.equal(numbers(stored, "w", {"method": "fp8", "block": (128, 128)}).bfloat16(), theirs)


def test_mxfp4_against_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(256, (3, 96, 2, 16), generator=generator, dtype=torch.uint8)
    powers = torch.randint(90, 140, (3, 96, 2), generator=generator, dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(codes, powers, dtype=torch.float32)
    ours = numbers({"w_blocks": codes, "w_scales": powers}, "w", {"method": "mxfp4"})
    assert torch.equal(ours, theirs if theirs.shape == ours.shape else theirs.mT)


def numbers(tensors: dict[str, Tensor], name: str, storage: dict) -> Tensor:
    """What a tensor of a file stands for."""
    import tempfile

    from glasklar.model.tensor_file import read_header

    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "x.safetensors")
        found = quantised.weights(read_header(Path(folder) / "x.safetensors"), quantised.Storage(**storage))
        return torch.cat(list(found[name].in_order())).view(found[name].shape)


@torch.inference_mode()
def test_mxfp4_models_answer_as_their_numbers_do(tmp_path: Path) -> None:
    """The folder with codes, and the one with the numbers that transformers reads from `convert`: the same logits."""
    from test_against_transformers import load_theirs, our_logits

    folder = mxfp4_folder(tmp_path / "codes")
    convert(folder, tmp_path / "numbers", to="hf", dtype="fp32", name="m")
    ours = load_model(folder, dtype=torch.float32, ops=REFERENCE, device="cpu")
    ids_BT = torch.randint(96, (1, 40), generator=torch.Generator().manual_seed(2))
    expected = load_theirs(tmp_path / "numbers")(ids_BT).logits
    assert (our_logits(ours, ids_BT) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("make", [lambda path: fp8_folder(path)[0], mxfp4_folder], ids=["fp8", "mxfp4"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_while_loading_is_quantised_afterwards(make, quantize: str, tmp_path: Path) -> None:
    """Packed while it is read and packed from the whole network in memory: the same bits."""
    folder = make(tmp_path / "m")
    whole = load_model(folder, dtype=torch.float32, ops=REFERENCE, device="cpu").requires_grad_(False)
    if (compiled := library.best()) is None:
        pytest.skip("the C++ pass is not compiled")
    told: list[tuple[int, int]] = []
    streamed = load(folder, Runtime(), quantize=quantize, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0
    wanted = pack(whole.config, whole.state_dict().__getitem__, Packer(compiled, KINDS[quantize], 2), draft=True)
    found = dict(streamed.network.tensors())
    assert found.keys() == dict(wanted.tensors()).keys()
    assert all(torch.equal(found[name].to(tensor.dtype), tensor) for name, tensor in wanted.tensors())
    [answer] = Engine(streamed.network).generate([[1, 2, 3]], SamplingParams(max_tokens=20, temperature=0.0))
    row = streamed.logits([1, 2, 3, *answer.ids])
    assert row[2:-1].argmax(-1).tolist() == answer.ids
    with pytest.raises(Exception, match="load it without quantize"):
        _ = streamed.transformer
    for ids, message in (
        ([1, -3], "token id -3"),
        ([whole.config.vocab_size], "vocabulary has ids 0 to"),
        ([], "no tokens"),
    ):
        with pytest.raises(RequestError, match=message):
            streamed.logits(ids)


def test_fp32_numbers_packed_while_loading_give_the_network_s_logits(tmp_path: Path) -> None:
    folder, _ = fp8_folder(tmp_path / "m")
    whole = load(folder, Runtime(), "float32")
    close = load(folder, Runtime(), quantize="int8").logits([1, 2, 3, 4])
    assert (close - whole.logits([1, 2, 3, 4])).abs().max() < 0.1 * close.abs().max()


BAD_CONFIG = {
    "method": ({"quant_method": "awq", "bits": 4}, "'awq' is not supported"),
    "no block": ({"quant_method": "fp8"}, "weight_block_size = None"),
    "block of nothing": ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"weight_block_size = \[0, 128\]"),
    "other format": ({"quant_method": "fp8", "weight_block_size": [16, 32], "fmt": "e5m2"}, "e5m2"),
    "no object": ("fp8", "no object"),
    "none": (None, "has the type torch.float8_e4m3fn"),
    "wrong block": ({"quant_method": "fp8", "weight_block_size": [32, 32]}, "scale_inv has the shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CONFIG)
def test_other_quantisations_are_refused(name: str, tmp_path: Path) -> None:
    folder, _ = fp8_folder(tmp_path / "m")
    table, words = BAD_CONFIG[name]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": table}))
    with pytest.raises(CheckpointError, match=words):
        load_model(folder, dtype=torch.float32, ops=REFERENCE, device="cpu")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scales_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    folder, _ = fp8_folder(tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"
    tensors[name][-1, -1] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for to in ("hf", "gguf"):
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name}.*no number.*fetch"):
            convert(folder, tmp_path / "out", to=to, dtype="bf16", name="m")
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]
    codes = mxfp4_folder(tmp_path / "mxfp4")
    tensors = load_file(codes / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_scales"][3, 5, 0] = 255
    save_file(tensors, codes / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj_scales.*no number"):
        load_model(codes, dtype=torch.float32, ops=REFERENCE, device="cpu")


@pytest.mark.parametrize("lacking", ["scale_inv", "weight"])
def test_scales_and_numbers_come_together(lacking: str, tmp_path: Path) -> None:
    folder, _ = fp8_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.self_attn.o_proj.weight" + ("_scale_inv" if lacking == "scale_inv" else "")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.o_proj"):
        load_model(folder, dtype=torch.float32, ops=REFERENCE, device="cpu")
