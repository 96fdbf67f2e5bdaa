"""Loading in a fresh process: how much memory it takes, and what a folder without a tokenizer is good for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glasklar import api
from glasklar.errors import CheckpointError, RequestError
from glasklar.loading import load, open_folder
from glasklar.model.checkpoint import save_model
from glasklar.model.config import ModelConfig
from glasklar.model.init import build
from glasklar.runtime import Runtime

FIELDS = {
    "vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 4096, "rope_interleave": False,
}  # fmt: skip
PROGRAM = """
import json, sys
from pathlib import Path
from glasklar.runtime import peak_bytes as peak, prepare, start
runtime = start(prepare(2))
from glasklar.loading import load
from glasklar.model.checkpoint import open_checkpoint
folder, dtype, quantize = Path(sys.argv[1]), *(None if word == "-" else word for word in sys.argv[2:])
load(folder.parent / "tiny", runtime, dtype, quantize=quantize)  # whatever libraries need once
before, told = peak(), []
network = load(
    folder, runtime, dtype, quantize=quantize, progress=lambda done, total: told.append(done / total)
).network
size = network.nbytes if quantize else sum(t.nbytes for t in network.state_dict().values())
print(json.dumps({"over": peak() - before - size, "size": size, "told": [len(told), told[-1], sorted(told) == told]}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """250 MB in bf16, the largest tensor 66 MB; a tiny model beside it."""
    path = tmp_path_factory.mktemp("models")
    for name, changes in (("big", {}), ("tiny", {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64})):
        model = build(ModelConfig.read({**FIELDS, **changes}, "case"), dtype=torch.bfloat16)
        for tensor in model.parameters():
            torch.nn.init.uniform_(tensor, -0.1, 0.1)
        save_model(model, path / name)
    return path / "big"


@pytest.mark.parametrize(
    ("dtype", "quantize"),
    [
        ("bfloat16", "-"), ("-", "int4"),
        pytest.param("float32", "-", marks=pytest.mark.slow), pytest.param("-", "int8", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_loading_takes_little_more_than_the_model(folder: Path, dtype: str, quantize: str) -> None:
    """At most the largest tensor (in the type in which it is packed) and 90 MB; a mapped file alone would be 250 MB."""
    command = [sys.executable, "-c", PROGRAM, str(folder), dtype, quantize]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if quantize != "-" and "need the compiled pass" in done.stderr:
        pytest.skip("the C++ pass is not compiled")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["size"] > 70e6
    assert found["over"] < 66e6 + 90e6
    assert found["told"][0] > 10
    assert found["told"][1:] == [1.0, True]


def test_a_folder_without_a_tokenizer_speaks_ids(folder: Path) -> None:
    model = load(folder.parent / "tiny", Runtime(), "float32")
    assert model.tokenizer is None
    settings = {"max_tokens": 8, "temperature": 0.0, "seed": 0}
    answer = api.generate(model, None, "1,2,3", **settings)
    assert len(answer["ids"]) == 8
    assert answer["text"] is None
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json; it can be asked with --prompt-ids"):
        api.generate(model, "hello", None, **settings)
    with pytest.raises(RequestError, match="whole numbers"):
        api.generate(model, None, "1;2", **settings)


def test_quantised_weights_are_computed_on_the_cpu(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where there is a GPU, and it says so."""
    assert open_folder(folder, Runtime(device="cuda"), quantize="int4").runtime.device == "cpu"
    assert "computed on the CPU" in caplog.text
    assert open_folder(folder, Runtime(device="cuda")).runtime.device == "cuda"


def test_only_packed_weights_are_kept_in_memory(folder: Path) -> None:
    assert open_folder(folder, Runtime(), quantize="int4", cache=folder, locked=True).locked
    for settings in ({}, {"quantize": "int4"}):
        with pytest.raises(CheckpointError, match="use --quantize"):
            open_folder(folder, Runtime(), **settings, locked=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"quantize": "int2"}, "quantize = 'int2': use one of int8, int4"), ({"dtype": "fp8"}, "dtype = 'fp8': use one")],
)
def test_unknown_precisions(settings: dict[str, str], words: str, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        load(folder, Runtime(), **settings)  # type: ignore[arg-type]
