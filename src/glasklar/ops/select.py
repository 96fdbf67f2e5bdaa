"""The table of operations that a model is built with: chosen once from the runtime, never exchanged silently."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glasklar.errors import RecipeError
from glasklar.ops import reference
from glasklar.runtime import Runtime

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One implementation for each operation; all share the signatures in `reference.py`."""

    name: str
    rms_norm: Callable[..., Any] = reference.rms_norm
    rotate: Callable[..., Any] = reference.rotate
    attention: Callable[..., Any] = reference.attention
    swiglu: Callable[..., Any] = reference.swiglu
    route: Callable[..., Any] = reference.route
    experts: Callable[..., Any] = reference.experts
    token_logprobs: Callable[..., Any] = reference.token_logprobs


REFERENCE = Ops(name="reference")


def select(runtime: Runtime, wanted: str | None = None) -> Ops:
    """Ops for this runtime; `wanted` forces one table by name. Raises RecipeError for an unknown name."""
    tables = {"reference": REFERENCE}
    name = wanted or "reference"
    if name not in tables:
        raise RecipeError(f"ops = {name!r}: known tables are {', '.join(tables)}")
    log.info("ops: %s on %s", name, runtime.device)
    return tables[name]
