"""Folders that are damaged, of two models, or made to do harm: refused by file, tensor and remedy, nothing written."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glasklar.convert.export import convert
from glasklar.errors import CheckpointError
from glasklar.loading import load
from glasklar.model.checkpoint import INDEX, WEIGHTS, load_model, save_model
from glasklar.model.config import ModelConfig
from glasklar.model.hf_config import read_config
from glasklar.model.init import build, initialise
from glasklar.ops.select import REFERENCE
from glasklar.runtime import Runtime

FIELDS = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 20, "first_k_dense_replace": 1,
}  # fmt: skip
NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.experts.3.down_proj.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "whole"
    save_model(initialise(build(ModelConfig.read(FIELDS, "case")), 1), path)
    return path


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """The model in two shards with an index, as larger ones are published."""
    path = tmp_path / "m"
    path.mkdir()
    (path / "config.json").write_bytes((whole / "config.json").read_bytes())
    tensors = load_file(whole / WEIGHTS)
    half = set(sorted(tensors)[::2])
    for shard, names in ((FIRST, half), (SECOND, tensors.keys() - half)):
        save_file({name: tensors[name] for name in names}, path / shard, {"format": "pt"})
    (path / INDEX).write_text(json.dumps({"weight_map": {name: FIRST if name in half else SECOND for name in tensors}}))
    return path


def index(folder: Path, **changes: Any) -> None:
    table = json.loads((folder / INDEX).read_text())
    table["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(table))


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], name: str) -> Callable[[Path], Any]:
    """A change to the shard of a tensor."""

    def harm(folder: Path) -> None:
        path = shard_of(folder, name)
        found = load_file(path)
        change(found)
        save_file(found, path, {"format": "pt"})

    return harm


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A change to the header of the shard with the last norm, its data as they are."""

    def harm(folder: Path) -> None:
        path = shard_of(folder, NORM)
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        table = json.loads(raw[8 : 8 + length])
        text = json.dumps(change(table) or table).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return harm


def cut(folder: Path) -> None:
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-100])


def long_header(folder: Path) -> None:
    (folder / FIRST).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def long_but_there(folder: Path) -> None:
    with (folder / FIRST).open("wb") as file:
        file.write(struct.pack("<Q", 9 << 20))
        file.truncate(10 << 20)


def overlap(table: dict[str, Any]) -> None:
    names = sorted((name for name in table if name != "__metadata__"), key=lambda name: table[name]["data_offsets"])
    first, second = names[:2]
    size = table[second]["data_offsets"][1] - table[second]["data_offsets"][0]
    begin = table[first]["data_offsets"][1] - 4
    table[second]["data_offsets"] = [begin, begin + size]


def only_pickle(name: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        for path in folder.glob("model*"):
            path.unlink()
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")

    return harm


HARM: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda folder: (folder / SECOND).unlink(), rf"{SECOND}: missing.*fetch it"),
    "truncated shard": (cut, rf"{SECOND}: damaged \(its tensors need \d+ bytes and it has \d+\); fetch"),
    "empty shard": (lambda folder: (folder / SECOND).write_bytes(b""), rf"{SECOND}: damaged .*cut off\); fetch"),
    "index out of the folder": (
        lambda folder: index(folder, **{NORM: "../../etc/passwd"}), r"index\.json: 'model\.norm\.weight' lies in "
        r"'\.\./\.\./etc/passwd'; only safetensors files of the folder itself.*do not use",
    ),
    "absolute index": (lambda folder: index(folder, **{NORM: "/etc/passwd"}), r"'/etc/passwd'; only safetensors"),
    "index of a folder within": (lambda folder: index(folder, **{NORM: "x/y.safetensors"}), "only safetensors files"),
    "index without a map": (lambda folder: (folder / INDEX).write_text("{}"), "weight_map is missing"),
    "no JSON": (lambda folder: (folder / INDEX).write_text("{"), "not valid JSON.*fetch the file again"),
    "deep JSON": (lambda folder: (folder / INDEX).write_text("[" * 100000), "not valid JSON"),
    "key twice": (lambda folder: (folder / INDEX).write_text('{"a": 1, "a": 2}'), "'a' occurs twice"),
    "tensor that the index lacks": (
        tensors(lambda found: found.update(extra=torch.zeros(2)), NORM), "holds 'extra', which .* places in None",
    ),
    "tensor that only the index has": (tensors(lambda found: found.pop(NORM), NORM), rf"lacks '{NORM}'.*fetch it"),
    "wrong shape": (
        tensors(lambda found: found.update({DOWN: torch.zeros(32, 21)}), DOWN),
        rf"safetensors: {DOWN} has the shape \[32, 21\], config.json asks for \[32, 20\]; fetch",
    ),
    "wrong type": (
        tensors(lambda found: found.update({DOWN: torch.zeros(32, 20, dtype=torch.int64)}), DOWN),
        rf"safetensors: '{DOWN}' has the type 'I64'; only .* can be loaded",
    ),
    "8 bits without scales": (
        tensors(lambda found: found.update({DOWN: torch.zeros(32, 20).to(torch.float8_e4m3fn)}), DOWN),
        rf"safetensors: {DOWN} .*has the type torch.float8_e4m3fn.*take the model in bf16",
    ),
    "header without end": (long_header, rf"{FIRST}: damaged .*cut off"),
    "absurd header": (long_but_there, rf"{FIRST}: damaged \(a header of 9,437,184 bytes; at most"),
    "overlapping offsets": (header(overlap), "overlaps the tensor before it.*fetch the file again"),
    "gap": (
        header(lambda table: table[NORM].update(data_offsets=[n + 4 for n in table[NORM]["data_offsets"]])),
        "gap before it|overlaps|its tensors need",
    ),
    "offsets below zero": (header(lambda table: table[NORM].update(data_offsets=[-8, 120])), r"at \[-8, 120\]"),
    "offsets of another size": (header(lambda table: table[NORM].update(shape=[33])), "needs 132 bytes and has 128"),
    "endless shape": (header(lambda table: table[NORM].update(shape=[10**30])), "needs 4000000000000.* bytes"),
    "entries beyond the format": (header(lambda table: table[NORM].update(code="x")), "dtype, shape and data_offsets"),
    "header that is a list": (header(lambda table: [table]), "holds no JSON object"),
    "pickle": (only_pickle("pytorch_model.bin"), r"model\.bin: a pickle file can run any code.*take the model as"),
    "other pickle": (only_pickle("consolidated.00.pt"), r"consolidated\.00\.pt: a pickle file can run any code"),
    "nothing at all": (lambda folder: [path.unlink() for path in folder.glob("model*")], "holds neither model"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARM)
def test_damaged_weights(name: str, folder: Path, tmp_path: Path) -> None:
    harm, words = HARM[name]
    harm(folder)
    there = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=words):
        load_model(folder, dtype=torch.float32, ops=REFERENCE, device="cpu")
    with pytest.raises(CheckpointError, match=words):
        load(folder, Runtime(), quantize="int8")
    for to in ("hf", "gguf"):
        with pytest.raises(CheckpointError, match=words):
            convert(folder, tmp_path / "out", to=to, dtype="fp32", name="m")
    assert sorted(path.name for path in tmp_path.rglob("*")) == there


def test_the_undamaged_folder_loads(folder: Path, whole: Path) -> None:
    """So that what is refused above is refused for its damage."""
    ours = load_model(folder, dtype=torch.float32, ops=REFERENCE, device="cpu").state_dict()
    other = load_model(whole, dtype=torch.float32, ops=REFERENCE, device="cpu").state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found.pop(NORM), rf"lacks {NORM}; fetch configuration and weights"),
        (lambda found: found.update(extra=torch.zeros(2)), "holds extra, which config.json does not ask for"),
        (
            lambda found: found.update({"model.layers.2.enorm.weight": torch.zeros(32)}),
            r"holds model\.layers\.2\.enorm.*set num_nextn_predict_layers",
        ),
    ],
    ids=["missing", "surplus", "surplus layer"],
)
def test_tensors_missing_and_surplus(change: Any, words: str, whole: Path, tmp_path: Path) -> None:
    found = load_file(whole / WEIGHTS)
    change(found)
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    save_file(found, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        load_model(tmp_path, dtype=torch.float32, ops=REFERENCE, device="cpu")


def test_a_copy_of_the_embedding_that_is_none(whole: Path, tmp_path: Path) -> None:
    config = json.loads((whole / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load_file(whole / WEIGHTS)
    save_file(found, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_model(tmp_path, dtype=torch.float32, ops=REFERENCE, device="cpu")
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    save_file(found, tmp_path / WEIGHTS, {"format": "pt"})
    load_model(tmp_path, dtype=torch.float32, ops=REFERENCE, device="cpu")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": ({"model_type": "gpt2"}, r"config\.json: model_type = 'gpt2' is unknown; known are deepseek_v3"),
    "no type": ({"model_type": None}, "model_type = None is unknown"),
    "a type that is no text": ({"model_type": ["llama"]}, "is unknown"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads = 0"),
    "negative width": ({"hidden_size": -32}, "hidden_size = -32"),
    "a million million experts": ({"n_routed_experts": 10**12}, "n_routed_experts = 1000000000000"),
    "as many layers": ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000"),
    "as many words": ({"vocab_size": 10**12}, "vocab_size = 1000000000000"),
    "experts within the limit": ({"n_routed_experts": 60000}, "asks for more than .* tensors"),
    "layers within the limit": ({"num_hidden_layers": 60000}, "asks for more than .* tensors"),
    "words within the limit": ({"vocab_size": 1 << 20}, r"shape \[64, 32\], config.json asks for \[1048576, 32\]"),
    "text for a number": ({"hidden_size": "32"}, "hidden_size"),
    "no number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "half a head": ({"qk_rope_head_dim": 7}, "must be even"),
    "more chosen than there are": ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5 exceeds"),
    "groups of none": ({"n_group": 3, "topk_group": 1}, "n_group = 3"),
    "unknown key": ({"attn_logit_softcapping": 30.0}, "'attn_logit_softcapping' is unknown and may change"),
    "unknown rope": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
    "rope of text": ({"rope_scaling": "yarn"}, "is no object"),
    "other activation": ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_are_refused_before_anything_is_allocated(name: str, whole: Path, tmp_path: Path) -> None:
    changes, words = CONFIGS[name]
    config = json.loads((whole / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((whole / WEIGHTS).read_bytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=words):
        load_model(tmp_path, dtype=torch.float32, ops=REFERENCE, device="cpu")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


WINDOWS: dict[str, tuple[dict[str, Any], str]] = {
    "no list": ({"layer_types": "sliding_attention"}, "no list of names"),
    "unknown kind": ({"layer_types": ["chunked_attention", "full_attention"]}, "layer_types.0 = .chunked_attention"),
    "too few": ({"layer_types": ["sliding_attention"]}, "names 1 layers and num_hidden_layers is 2"),
    "no window": ({"layer_types": ["sliding_attention"] * 2, "use_sliding_window": False}, "no window is in use"),
    "endless window": ({"sliding_window": 1 << 40}, "sliding_window = 1099511627776"),
    "no beginning": ({"max_window_layers": None}, "max_window_layers is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_that_make_no_sense(name: str, tmp_path: Path) -> None:
    table = {
        "model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(table))
    assert [read_config(tmp_path).window(layer) for layer in range(2)] == [None, 8]
    changes, words = WINDOWS[name]
    (tmp_path / "config.json").write_text(json.dumps(table | changes))
    with pytest.raises(CheckpointError, match=words):
        read_config(tmp_path)


def test_code_named_by_a_configuration_never_runs(whole: Path, tmp_path: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((whole / WEIGHTS).read_bytes())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    model = load(tmp_path, Runtime(), "float32")
    assert model.tokenizer is None
    assert model.logits([1, 2, 3]).shape == (3, 64)
    convert(tmp_path, tmp_path / "out", to="hf", dtype="fp32", name="m")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "evil.py").exists()
    assert not (tmp_path / "ran").exists()


def test_other_designs_get_no_advice_about_prediction_layers(tmp_path: Path) -> None:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    dense = {name: FIELDS[name] for name in names} | {"num_key_value_heads": 2, "head_dim": 8, "rope_interleave": False}
    save_model(initialise(build(ModelConfig.read(dense, "case")), 1), tmp_path / "m")
    table = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**table, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match="fetch configuration and weights of the same model"):
        load_model(tmp_path / "m", dtype=torch.float32, ops=REFERENCE, device="cpu")


def test_drafting_layers_that_are_named_and_not_there(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers saves DeepSeek-V3 like that: all that the answers depend on is there."""
    table = json.loads((whole / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**table, "num_nextn_predict_layers": 1}))
    (tmp_path / WEIGHTS).write_bytes((whole / WEIGHTS).read_bytes())
    model = load_model(tmp_path, dtype=torch.float32, ops=REFERENCE, device="cpu")
    assert not len(model.mtp)
    assert "loaded without" in caplog.text
    packed = load(tmp_path, Runtime(device="cpu", threads=1), quantize="int8")
    assert packed.config.num_nextn_predict_layers == 0


def test_damaged_numbers_are_placed(whole: Path, tmp_path: Path) -> None:
    found = load_file(whole / WEIGHTS)
    found[DOWN][0, 0] = float("nan")
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    save_file(found, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1: a weight matrix .* not finite"):
        load(tmp_path, Runtime(device="cpu", threads=1), quantize="int4")
