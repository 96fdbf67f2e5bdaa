"""A tiny random model with a tokenizer, made in a second: it says nothing, but as a large one does."""

from __future__ import annotations

import json
from pathlib import Path

from glasklar.data.tokenizer import Tokenizer
from glasklar.loading import Model, load
from glasklar.model.checkpoint import save_model
from glasklar.model.config import ModelConfig
from glasklar.model.init import build, initialise
from glasklar.runtime import Runtime

CONTEXT = 2048


def texts() -> list[str]:
    calls = [json.dumps({"name": "add", "arguments": {"a": a, "b": b}}) for a in range(20) for b in range(20)]
    return [f"what is {i} plus {i + 1}? <tool_call>\n{call}\n</tool_call> größer" for i, call in enumerate(calls)]


def config(vocabulary: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=CONTEXT, initializer_range=0.3, num_key_value_heads=2, head_dim=8,
        rope_interleave=False,
    )  # fmt: skip


def make(folder: Path, runtime: Runtime) -> Model:
    """A model with this project's tokenizer and chat format."""
    tokenizer = Tokenizer.train(texts(), 300)
    save_model(initialise(build(config(328)), 5), folder, extra=tokenizer.files() | {"recipe.json": b"{}"})
    return load(folder, runtime)
