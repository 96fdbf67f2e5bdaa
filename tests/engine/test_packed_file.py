"""Packed weights on disk. Oracles: the same weights packed in memory; a file in which one byte is another."""

from __future__ import annotations

import gc
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from glasklar.engine import packed_file
from glasklar.engine.cpu import library
from glasklar.engine.engine import Engine
from glasklar.engine.packed import KINDS, PackedModel, Packer, pack
from glasklar.engine.packed_file import HEADER, kept_packed, key_of
from glasklar.engine.request import SamplingParams
from glasklar.errors import CapacityError
from glasklar.loading import load
from glasklar.model.checkpoint import save_model
from glasklar.model.config import ModelConfig
from glasklar.model.init import build, initialise
from glasklar.runtime import Runtime

MLA = {
    "vocab_size": 97, "hidden_size": 72, "num_hidden_layers": 3, "num_attention_heads": 5, "kv_lora_rank": 40,
    "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20, "intermediate_size": 100, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_shared_experts": 1, "moe_intermediate_size": 52, "first_k_dense_replace": 1,
    "n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1,
}  # fmt: skip
GQA = {
    "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 12, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 100, "rope_interleave": False, "attention_bias": True,
    "tie_word_embeddings": True,
}  # fmt: skip
WINDOWS = {**GQA, "sliding_window": 24, "layer_types": ("sliding_attention", "full_attention")}
pytestmark = pytest.mark.skipif(library.best() is None, reason="the C++ pass is not compiled")


def folder_of(path: Path, fields: dict[str, object], seed: int = 1) -> Path:
    model = initialise(build(ModelConfig(**fields), dtype=torch.bfloat16), seed)  # type: ignore[arg-type]
    save_model(model, path)
    return path


def opened(folder: Path, cache: Path, quantise: str = "int4", made: list[int] | None = None) -> PackedModel:
    made = [] if made is None else made
    return kept_packed(folder, quantise, cache=cache, threads=2, progress=lambda done, of: made.append(done))


@pytest.mark.parametrize(
    "fields", [MLA, GQA, WINDOWS], ids=["mla with a draft module", "gqa with biases, tied", "windows"]
)
@pytest.mark.parametrize("quantise", ["int8", "int4"])
def test_what_is_mapped_is_what_is_packed(fields: dict[str, object], quantise: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", fields)
    made: list[int] = []
    first = opened(folder, tmp_path / "cache", quantise, made)
    reads = len(made)
    again = opened(folder, tmp_path / "cache", quantise, made)
    assert len(made) == reads > 0, "made once"
    assert first.precision == again.precision == quantise
    compiled = library.best()
    assert compiled is not None
    network = initialise(build(ModelConfig(**fields), dtype=torch.bfloat16), 1)  # type: ignore[arg-type]
    wanted = pack(first.config, network.state_dict().__getitem__, Packer(compiled, KINDS[quantise], 1), draft=True)
    for found in (first, again):
        tensors = dict(found.tensors())
        assert list(tensors) == [name for name, _ in wanted.tensors()]
        assert all(torch.equal(tensors[name], tensor) for name, tensor in wanted.tensors())
    assert all(tensor.data_ptr() % 64 == HEADER % 64 for _, tensor in again.tensors()), "lines of the cache are not cut"
    assert [layer.window for layer in again.layers] == [layer.window for layer in wanted.layers]
    biases = [m.bias is not None for layer in again.layers for m in layer.matrices.values()]
    assert biases == [m.bias is not None for layer in wanted.layers for m in layer.matrices.values()]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell how it reads a mapping")
def test_of_the_embedding_the_system_reads_single_pages(tmp_path: Path) -> None:
    model = opened(folder_of(tmp_path / "model", {**MLA, "vocab_size": 1000}), tmp_path / "cache")

    def flags(address: int) -> list[str]:
        inside, found = False, []
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name = line.split()[0]
            if "-" in name and not name.endswith(":"):
                begin, end = (int(part, 16) for part in name.split("-"))
                inside = begin <= address < end
            elif inside and name == "VmFlags:":
                found = line.split()[1:]
        return found

    single = "rr"  # of MADV_RANDOM
    assert single in flags(model.embedding.data_ptr() + model.embedding.nbytes // 2)
    assert single not in flags(model.layers[1].matrices["experts_gate_up"].data.data_ptr() + 8192)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists() or 0 <= resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < 1 << 22,
    reason="the system does not tell what it keeps in memory, or keeps too little",
)
def test_a_file_stays_in_memory_where_asked(tmp_path: Path) -> None:
    def state(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(name))

    folder = folder_of(tmp_path / "model", {**MLA, "vocab_size": 2000})
    opened(folder, tmp_path / "cache")
    kept, own = state("VmLck:"), state("RssAnon:")
    told: list[tuple[int, int]] = []
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    model = kept_packed(folder, "int4", cache=tmp_path / "cache", threads=2, locked=True, progress=progress)
    [file] = (tmp_path / "cache").glob("*.safetensors")
    size = file.stat().st_size
    assert size > 1 << 20
    assert state("VmLck:") - kept >= size
    assert state("RssAnon:") - own < size // 2, "the pages of the file itself, no copies"
    assert told[-1] == (size, size)
    del model
    gc.collect()
    assert state("VmLck:") == kept


def test_what_cannot_stay_in_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 16))
    real = packed_file._pieces
    monkeypatch.setattr(packed_file, "_pieces", lambda size: ((begin + (1 << 62), n) for begin, n in real(size)))
    with pytest.raises(CapacityError, match=r"file: the system does not keep 0.00 GB in memory .+ulimit -l"):
        packed_file.lock(tmp_path / "file")


def test_any_damage_is_found_and_the_file_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, cache = folder_of(tmp_path / "model", MLA), tmp_path / "cache"
    sound = {name: tensor.clone() for name, tensor in opened(folder, cache).tensors()}
    [path] = cache.iterdir()
    content = path.read_bytes()
    size = len(content)
    used = max(i for i in range(8, HEADER) if content[i] != 32)
    places = [*range(8, used, used // 9), HEADER, HEADER + 1000, size // 2 + HEADER // 2, size - 100]
    damages = [content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :] for place in places]
    for damaged in (*damages, content[: size // 2], content + b"\0", b"", b"\xff" * 100):
        path.write_bytes(damaged)
        made: list[int] = []
        again = opened(folder, cache, made=made)
        assert made, "damage was not seen"
        assert all(torch.equal(tensor, sound[name]) for name, tensor in again.tensors())
        assert path.read_bytes() == content
    assert "made again" in caplog.text


def test_a_file_is_checked_once_and_again_when_anything_wrote_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[int] = []
    check = packed_file._check

    def counted(*arguments: Any) -> None:
        checks.append(1)
        check(*arguments)

    monkeypatch.setattr(packed_file, "_check", counted)
    monkeypatch.setattr(packed_file, "_SETTLED_NS", 0)
    folder, cache = folder_of(tmp_path / "model", GQA), tmp_path / "cache"
    for _ in range(3):
        opened(folder, cache)
    assert len(checks) == 1
    [path] = cache.glob("*.safetensors")
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    time.sleep(0.02)  # a tick of the clock of files
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # what can be set is set back
    made: list[int] = []
    opened(folder, cache, made=made)
    assert made, "damage was not seen"
    opened(folder, cache)
    checks.clear()
    boot = Path("/proc/sys/kernel/random/boot_id")
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, **how: "another" if self == boot else real(self, **how))
    opened(folder, cache)
    opened(folder, cache)
    assert len(checks) == 1, "once after every start of the machine"


def test_a_file_written_just_now_is_checked_every_time(tmp_path: Path) -> None:
    folder, cache = folder_of(tmp_path / "model", GQA), tmp_path / "cache"
    opened(folder, cache)
    opened(folder, cache)
    assert not list(cache.glob("*.checked"))


def test_another_model_configuration_or_number_of_bits_is_packed_anew(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", GQA)
    keys = {key_of(folder, "int4"), key_of(folder, "int8")}
    weights = folder / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stamp, stamp))
    keys.add(key_of(folder, "int4"))
    os.utime(weights, ns=(stamp, stamp + 1))
    keys.add(key_of(folder, "int4"))
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    keys.add(key_of(folder, "int4"))
    assert len(keys) == 5


def test_a_full_disk_is_said_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = folder_of(tmp_path / "model", GQA), tmp_path / "cache"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError, match="no room to write"):
        opened(folder, cache)
    assert list(cache.iterdir()) == []


def test_a_quantised_model_answers_like_its_logits(tmp_path: Path) -> None:
    folder, cache = folder_of(tmp_path / "model", MLA), tmp_path / "cache"
    model = load(folder, Runtime(threads=2), quantize="int8", cache=cache)
    prompt = [5, 17, 3, 88, 42]
    [answer] = Engine(model.network).generate([prompt], SamplingParams(max_tokens=8, temperature=0.0))
    logits = model.logits([*prompt, *answer.ids])
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == list(answer.ids)
    whole = load(folder, Runtime(threads=2), dtype="float32").logits(prompt)
    assert torch.nn.functional.cosine_similarity(model.logits(prompt), whole, dim=-1).min() > 0.99
