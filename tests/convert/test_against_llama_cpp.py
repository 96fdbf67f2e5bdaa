"""llama.cpp goes on from the exported files with our own engine's tokens, and splits texts as our tokenizer does."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_models import CASES, llama_tokens, save, tokenizer

from glasklar.convert.export import convert
from glasklar.engine.engine import Engine
from glasklar.engine.request import SamplingParams

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: see bench/gguf.py", exc_type=ImportError)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TOKENS = 64


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_against_llama_cpp(name: str, seed: int, tmp_path: Path) -> None:
    model = save(tmp_path / "m", CASES[name], seed)
    convert(tmp_path / "m", tmp_path / "m.gguf", to="gguf", dtype="fp32", name="m")
    prompt = [0, *range(40, 60)]
    [ours] = Engine(model).generate([prompt], SamplingParams(max_tokens=TOKENS, temperature=0.0))
    assert len(set(ours.ids)) > 10  # a model that repeats itself would show little
    assert llama_tokens(tmp_path / "m.gguf", prompt, TOKENS) == ours.ids


def test_ids_of_texts_against_llama_cpp(tmp_path: Path) -> None:
    from llama_cpp import Llama

    save(tmp_path / "m", CASES["llama"], 1)
    convert(tmp_path / "m", tmp_path / "m.gguf", to="gguf", dtype="fp32", name="m")
    llama, ours = Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False), tokenizer()
    texts = [
        "What is 12 + 7? It's größer",
        "don't\n\tsay: 日本 🙂",
        "a  b\n\n\nc (12) #3",
        " 1 2  x",
        "<think> hi </s>",
    ]
    for text in texts:
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == ours.encode(text), text
    special = llama.tokenize("<｜User｜>hi<think>".encode(), add_bos=False, special=True)
    assert special == ours.encode_many(["<｜User｜>hi<think>"], trusted=True)[0]
    assert llama.metadata["tokenizer.chat_template"]
    llama.close()
