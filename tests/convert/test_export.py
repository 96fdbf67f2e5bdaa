"""Files read back with the gguf package, folders with our own loader; what cannot be carried over is refused."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_models import CASES, random_model, save, tokenizer
from safetensors.torch import load_file, save_file

from glasklar.convert import gguf_metadata
from glasklar.convert.export import convert, stored_type
from glasklar.convert.gguf_metadata import architecture
from glasklar.convert.gguf_vocab import read_vocabulary
from glasklar.data.tokenizer import CHAT_TEMPLATE
from glasklar.errors import CheckpointError
from glasklar.model.checkpoint import hf_tensors, load_model
from glasklar.model.config import ModelConfig
from glasklar.ops.select import REFERENCE

V3 = "deepseek2, V3 with a predicting layer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save(path, CASES[V3], 1)
    return path


def contents(path: Path) -> tuple[dict[str, object], dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def floats(tensor: gguf.ReaderTensor) -> torch.Tensor:
    """Values in the order of a torch tensor (GGUF names the innermost dimension first)."""
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(values)).reshape(tuple(int(n) for n in reversed(tensor.shape)))


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_in_the_file_once_and_unchanged(name: str, tmp_path: Path) -> None:
    """As multisets: names and layout are llama.cpp's, the numbers are the model's."""
    model = save(tmp_path / "m", CASES[name], 3)
    convert(tmp_path / "m", tmp_path / "m.gguf", to="gguf", dtype="fp32", name="m")
    _, tensors = contents(tmp_path / "m.gguf")
    beyond = tuple(f"model.layers.{model.config.num_hidden_layers + k}." for k in range(8))
    ours = [t.flatten() for n, t in hf_tensors(model).items() if not n.startswith(beyond)]
    theirs = [floats(tensor).flatten() for name, tensor in tensors.items() if name != "rope_freqs.weight"]
    assert torch.equal(torch.cat(ours).sort().values, torch.cat(theirs).sort().values)


def test_names_shapes_and_keys_of_latent_attention(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "m.gguf", to="gguf", dtype="fp32", name="tiny")
    keys, tensors = contents(tmp_path / "m.gguf")
    model = load_model(folder, dtype=torch.float32, ops=REFERENCE, device="cpu")
    config, ours = model.config, hf_tensors(model)
    H, N, V = config.num_attention_heads, config.qk_nope_head_dim or 0, config.value_head_dim
    kv_b = ours["model.layers.0.self_attn.kv_b_proj.weight"].unflatten(0, (H, N + V))
    assert torch.equal(floats(tensors["blk.0.attn_k_b.weight"]), kv_b[:, :N].transpose(1, 2))
    assert torch.equal(floats(tensors["blk.0.attn_v_b.weight"]), kv_b[:, N:])
    experts = [ours[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in range(8)]
    assert torch.equal(floats(tensors["blk.1.ffn_up_exps.weight"]), torch.stack(experts))
    bias = ours["model.layers.2.mlp.gate.e_score_correction_bias"]
    assert torch.equal(floats(tensors["blk.2.exp_probs_b.bias"]), bias)
    assert not [name for name in tensors if name.startswith("blk.3.")]
    wanted = {
        "general.architecture": "deepseek2", "general.name": "tiny", "deepseek2.block_count": 3,
        "deepseek2.attention.head_count_kv": 1, "deepseek2.attention.key_length": 40,
        "deepseek2.attention.value_length": 32, "deepseek2.attention.key_length_mla": 24,
        "deepseek2.attention.value_length_mla": 24, "deepseek2.expert_gating_func": 2,
        "deepseek2.expert_weights_norm": True, "deepseek2.leading_dense_block_count": 1,
    }  # fmt: skip
    assert {key: keys[key] for key in wanted} == wanted


def test_tokenizer_and_template_are_in_the_file(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "m.gguf", to="gguf", dtype="fp32", name="m")
    keys, _ = contents(tmp_path / "m.gguf")
    ours = tokenizer()
    table = json.loads(ours.files()["tokenizer.json"])
    tokens = keys["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert tokens[ours.think_id] == "<think>"
    assert {token: index for index, token in enumerate(tokens)} == {
        **table["model"]["vocab"],
        **{t["content"]: t["id"] for t in table["added_tokens"]},
    }
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in table["model"]["merges"]]
    assert keys["tokenizer.ggml.eos_token_id"] == ours.eos_id
    assert keys["tokenizer.ggml.token_type"] == [3 if i in ours.special_ids else 1 for i in range(len(tokens))]
    assert (keys["tokenizer.ggml.pre"], keys["tokenizer.chat_template"]) == ("smollm", CHAT_TEMPLATE)


def test_small_types_are_near_and_gates_exact(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "fp32.gguf", to="gguf", dtype="fp32", name="m")
    _, exact = contents(tmp_path / "fp32.gguf")
    for dtype, bound in (("bf16", 2**-8), ("fp16", 2**-11), ("q8_0", 1 / 127)):
        made = convert(folder, tmp_path / f"{dtype}.gguf", to="gguf", dtype=dtype, name="m")
        _, tensors = contents(tmp_path / f"{dtype}.gguf")
        for name, tensor in tensors.items():
            wanted = floats(exact[name])
            assert (floats(tensor) - wanted).abs().max() <= bound * wanted.abs().max(), name
        assert torch.equal(floats(tensors["blk.1.ffn_gate_inp.weight"]), floats(exact["blk.1.ffn_gate_inp.weight"]))
        assert any("no multiple of 32" in note for note in made.notes) == (dtype == "q8_0")
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0


def test_folder_in_out_in_is_bit_equal_and_keeps_the_predicting_layer(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "copy", to="hf", dtype="fp32", name="m")
    first, second = (
        load_model(path, dtype=torch.float32, ops=REFERENCE, device="cpu") for path in (folder, tmp_path / "copy")
    )
    assert len(second.mtp) == 1
    ours, theirs = hf_tensors(first), hf_tensors(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()


GPT_OSS = {
    **CASES["llama"], "attention_bias": True, "output_bias": True, "attention_sinks": True, "scoring_func": "softmax",
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "swiglu_limit": 7.0,
}  # fmt: skip
PUBLISHED = {
    name: CASES[name]
    for name in (V3, "deepseek2, V2", "llama", "llama, tied, wide heads", "qwen2", "qwen3", "qwen3moe")
} | {"gpt_oss": GPT_OSS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_folders_come_out_as_they_went_in(name: str, tmp_path: Path) -> None:
    """bf16 in shards, gates too, embedding and head a second time where V3 has them: names, shapes, types and bits."""
    model = save(tmp_path / "m", PUBLISHED[name], 2, files=False)
    given = {key: tensor.bfloat16() for key, tensor in load_file(tmp_path / "m" / "model.safetensors").items()}
    for key in given:
        if key.endswith("e_score_correction_bias"):
            given[key] = given[key].float()
    if model.mtp:
        beyond = f"model.layers.{model.config.num_hidden_layers}"
        given[f"{beyond}.embed_tokens.weight"] = given["model.embed_tokens.weight"].clone()
        given[f"{beyond}.shared_head.head.weight"] = given["lm_head.weight"].clone()
    (tmp_path / "m" / "model.safetensors").unlink()
    shards = {key: f"model-{number % 3}.safetensors" for number, key in enumerate(sorted(given))}
    for shard in set(shards.values()):
        save_file({key: given[key] for key in given if shards[key] == shard}, tmp_path / "m" / shard)
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    told: list[tuple[int, int]] = []
    convert(
        tmp_path / "m", tmp_path / "out", to="hf", dtype="bf16", name="m", progress=lambda *place: told.append(place)
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == given.keys()
    for key, tensor in given.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(found[key], tensor), key
    assert told[-1][0] == told[-1][1] == sum(tensor.nbytes for tensor in given.values())
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("m", "out")]
    assert configs[0] | {"torch_dtype": "bfloat16"} == configs[1]


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_what_exists_is_not_overwritten(folder: Path, tmp_path: Path, to: str) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(folder, tmp_path / "out", to=to, dtype="fp32", name="m")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_numbers_beyond_fp16_leave_nothing_behind(tmp_path: Path, to: str) -> None:
    model = random_model(CASES["llama"], 1)
    model.layers[0].mlp.down_proj.weight[0, 0] = 1e6
    from glasklar.model.checkpoint import save_model

    save_model(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match="beyond fp16"):
        convert(tmp_path / "m", tmp_path / "out", to=to, dtype="fp16", name="m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({**CASES[V3], "attention_bias": True}, "biases in latent attention"),
        ({**CASES[V3], "n_shared_experts": 0}, "without a shared one"),
        ({**CASES["deepseek2, V2"], "n_group": 2, "topk_group": 1}, "ranked by their best"),
        ({**CASES[V3], "num_hidden_layers": 27}, "27 layers"),
        ({**CASES["llama"], "output_bias": True, "attention_bias": True}, "output_bias = True"),
        (
            {**CASES["qwen3"], "sliding_window": 9, "layer_types": ["sliding_attention"] * 2},
            "sliding_window = 9",
        ),
        ({**CASES[V3], "rope_scaling": {"factor": 2, "original_max_position_embeddings": 9}}, "YaRN with mscale = 1"),
    ],
)
def test_networks_that_llama_cpp_would_compute_otherwise_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        architecture(ModelConfig.read(fields, "case"))


def test_every_field_of_a_configuration_is_carried_or_refused() -> None:
    """A field that the network gets later must be thought of here too."""
    assert ModelConfig.model_fields.keys() >= gguf_metadata._CARRIED
    later = type("Later", (ModelConfig,), {"__annotations__": {"softcap": "int"}, "softcap": 0})
    assert architecture(later.read(CASES["llama"], "case")) == "llama"
    with pytest.raises(CheckpointError, match="no GGUF is written with softcap = 9"):
        architecture(later.read({**CASES["llama"], "softcap": 9}, "case"))


def test_other_pre_tokenizers_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    table = json.loads((folder / "tokenizer.json").read_text())
    table["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}{1,2}"
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="no pre-tokenizer for that"):
        read_vocabulary(tmp_path, 288)
    table["model"]["type"] = "Unigram"
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="'Unigram'; only byte-level BPE"):
        read_vocabulary(tmp_path, 288)


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_rounding_is_said(to: str, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    save(folder, CASES[V3], 1)
    assert stored_type(folder) == "fp32"
    exact = convert(folder, tmp_path / f"exact-{to}", to=to, dtype="fp32", name="m")
    rounded = convert(folder, tmp_path / f"rounded-{to}", to=to, dtype="bf16", name="m")
    assert not any("rounded" in note for note in exact.notes)
    assert any("rounded: the model is stored in fp32" in note for note in rounded.notes)
