"""A model of spark's shape with random weights: what servers are tested with where sense does not matter. Drawn at
temperature 1 its answers differ with every seed, so that no mix-up goes unseen."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import torch

from glasklar.data.tokenizer import Tokenizer
from glasklar.model.checkpoint import save_model
from glasklar.model.init import build, initialise
from glasklar.ops.select import select
from glasklar.recipe import load_recipe
from glasklar.runtime import Runtime


@torch.no_grad()
def make_model(folder: Path, runtime: Runtime, *, context: int = 2048) -> Path:
    """Writes the model; returns its folder."""
    config = load_recipe("spark").model.replace(max_position_embeddings=context)
    model = initialise(build(config, select(runtime), device="cpu", dtype=torch.float32), 0)
    tokenizer = Tokenizer.train(inspect.getsource(argparse).splitlines(), config.vocab_size)
    save_model(model, folder, extra=tokenizer.files())
    return folder
