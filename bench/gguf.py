"""Do exported files say the same? Greedy tokens of our engine beside llama.cpp's, per architecture, at fp32.

    python bench/gguf.py                          # small random models of every architecture
    python bench/gguf.py --model runs/spark       # a model of yours too, on prompts in its own chat format
    python bench/gguf.py --json

Needs llama-cpp-python (`pip install llama-cpp-python`: it is compiled, some ten minutes on two cores).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

# In place of this folder, in which a file called gguf would hide the package of that name.
sys.path[0] = str(Path(__file__).parents[1] / "tests" / "convert")

from glasklar.runtime import prepare, start  # noqa: E402

QUESTIONS = ("What is 17 + 25?", "hello", "How many r are in strawberry?", "Write a word that begins with b.")


def compare(folder: Path, prompts: list[list[int]], tokens: int) -> tuple[int, int]:
    """Tokens that are the same up to the first difference, and tokens in all."""
    import torch
    from gguf_models import llama_tokens

    from glasklar.convert.export import convert
    from glasklar.engine.engine import Engine
    from glasklar.engine.request import SamplingParams
    from glasklar.model.checkpoint import load_model
    from glasklar.ops.select import REFERENCE

    model = load_model(folder, dtype=torch.float32, ops=REFERENCE, device="cpu").requires_grad_(False)
    same = 0
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.gguf"
        convert(folder, path, to="gguf", dtype="fp32", name="bench")
        answers = Engine(model).generate(prompts, SamplingParams(max_tokens=tokens, temperature=0.0))
        for prompt, answer in zip(prompts, answers, strict=True):
            theirs = llama_tokens(path, prompt, tokens)
            same += next(
                (i for i, pair in enumerate(zip(answer.ids, theirs, strict=True)) if len(set(pair)) > 1), tokens
            )
    return same, tokens * len(prompts)


def conversations(folder: Path) -> list[list[int]]:
    from glasklar.data.chat import Message, render
    from glasklar.data.foreign import open_tokenizer

    tokenizer = open_tokenizer(folder)
    return [render(tokenizer, [Message(role="user", content=question)]) for question in QUESTIONS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a run, a folder or a name, besides the random models")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    start(prepare(1))
    from gguf_models import CASES, save

    from glasklar.loading import find_model
    from glasklar.provenance.rundir import home

    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, fields) in enumerate(CASES.items()):
            folder = Path(temporary) / str(number)
            save(folder, fields, seed=1)
            found[name] = compare(folder, [[0, *range(40, 60)], [0, 30, 9]], arguments.tokens)
    if arguments.model:
        folder = find_model(arguments.model, home(os.environ))
        found[f"{arguments.model}, in its chat format"] = compare(folder, conversations(folder), arguments.tokens)
    if arguments.json:
        print(json.dumps({name: {"same": same, "of": total} for name, (same, total) in found.items()}))
        return
    for name, (same, total) in found.items():
        print(f"{name:45} {same:4} of {total} greedy tokens as in llama.cpp")


if __name__ == "__main__":
    main()
