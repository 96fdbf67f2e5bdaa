"""The functions that `import glasklar` offers: those of `api.py` with the machine's runtime and home filled in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from glasklar import api
from glasklar.audit.findings import Findings
from glasklar.audit.verify import locate
from glasklar.audit.verify import verify as check
from glasklar.engine import engine
from glasklar.engine.packed import PackedModel
from glasklar.loading import Model, find_model, packed_under
from glasklar.loading import load as load_folder
from glasklar.model.plan import Plan
from glasklar.model.transformer import Transformer
from glasklar.provenance.rundir import home
from glasklar.runtime import Runtime, prepare, start


class Engine(engine.Engine):
    """`engine.engine.Engine`, which documents the settings, for a loaded model or the network within one."""

    def __init__(self, model: Model | Transformer | PackedModel, **settings: Any) -> None:
        super().__init__(model.network if isinstance(model, Model) else model, **settings)


def runtime(threads: int | None = None) -> Runtime:
    """This machine's runtime; call it before other torch work where the thread count matters."""
    return start(prepare(threads))


def load(model: str | Path, *, dtype: str | None = None, quantize: str | None = None) -> Model:
    """A model by run folder, Hugging Face folder, hub id or name; `dtype` "float32" or "bfloat16" (default); `quantize`
    "int8" or "int4", packed once and kept in the user's data folder: see `loading.load`."""
    folder = home(os.environ)
    return load_folder(find_model(str(model), folder), runtime(), dtype, quantize=quantize, cache=packed_under(folder))


def train(recipe: str, *, run: str | Path | None = None, seed: int | None = None) -> Path:
    """Carries out or resumes a recipe (built-in name or path of a TOML file); returns the run folder."""
    folder = None if run is None else Path(run)
    return api.train(recipe, runtime=runtime(), home=home(os.environ), run=folder, seed=seed)


def evaluate(
    model: Model | str | Path, *, split: str | None = None, problems: int | None = None, samples: int | None = None
) -> dict[str, Any]:
    """Accuracy of a model, loaded or by name or folder, on the tasks of its own recipe; see `api.evaluate`."""
    return api.evaluate(
        model if isinstance(model, Model) else load(model), split=split, problems=problems, samples=samples
    )


def plan(target: str, *, hardware: str = "cpu-2-cores", tokens: float | None = None) -> Plan:
    """What a recipe, a published shape or a model asks of a machine; see `api.plan`."""
    return api.plan(target, hardware=hardware, home=home(os.environ), tokens=tokens)


def verify(target: str | Path, *, key: str | None = None, head: str | None = None) -> Findings:
    """Every hash and signature of a run, a released model or a receipt, computed again; see `audit.verify`."""
    folder = home(os.environ)
    return check(locate(str(target), folder), home=folder, key=key, head=head)
