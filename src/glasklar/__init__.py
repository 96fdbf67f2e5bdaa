"""glasklar: an open, frugal and checkable language-model system in the DeepSeek design.

    import glasklar

    run = glasklar.train("spark", run="runs/spark")              # a recipe, carried out or resumed
    model = glasklar.load(run)                                   # a run, a Hugging Face folder, or the name of a run
    model.logits([1, 2, 3])                                      # fp32, [T, W]
    glasklar.Engine(model).generate([[1, 2, 3]], glasklar.SamplingParams(max_tokens=8))
    glasklar.evaluate(model)                                     # accuracy on its own tasks, unseen problems
    glasklar.plan("deepseek-v3", hardware="h800", tokens=14.8e12).hours
    glasklar.verify(run).verdict                                 # "holds" or "fails"; str() of it says what and why

Importing has no side effects; torch is loaded when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glasklar.engine.request import SamplingParams
    from glasklar.loading import Model
    from glasklar.python import Engine, evaluate, load, plan, train, verify

__version__ = "0.1.0"
__all__ = ["Engine", "Model", "SamplingParams", "__version__", "evaluate", "load", "plan", "train", "verify"]

_HOMES = {
    "Engine": "glasklar.python",
    "SamplingParams": "glasklar.engine.request",
    "Model": "glasklar.loading",
    "load": "glasklar.python",
    "train": "glasklar.python",
    "evaluate": "glasklar.python",
    "plan": "glasklar.python",
    "verify": "glasklar.python",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'glasklar' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
