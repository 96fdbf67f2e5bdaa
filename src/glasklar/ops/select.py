"""The table of operations that a model is built with: chosen once from the runtime, never exchanged silently."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from glasklar.errors import RecipeError
from glasklar.ops import inference, reference, torch_cpu
from glasklar.ops.cpu.functions import CpuKernels
from glasklar.ops.cpu.library import MULTIPLIES_BF16, VARIANTS, load
from glasklar.runtime import Runtime

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One implementation for each operation; all share the signatures in `reference.py`."""

    name: str
    rms_norm: Callable[..., Any] = reference.rms_norm
    add_rms_norm: Callable[..., Any] = reference.add_rms_norm
    rotate: Callable[..., Any] = reference.rotate
    attention: Callable[..., Any] = reference.attention
    latent_attention: Callable[..., Any] = reference.latent_attention
    linear: Callable[..., Any] = reference.linear
    feed_forward: Callable[..., Any] = reference.feed_forward
    gate: Callable[..., Any] = reference.gate
    route: Callable[..., Any] = reference.route
    experts: Callable[..., Any] = reference.experts
    # gpt-oss alone; on CPUs it is the engine's C++ pass that has to be fast
    sink_attention: Callable[..., Any] = reference.sink_attention
    clamped_experts: Callable[..., Any] = reference.clamped_experts
    token_logprobs: Callable[..., Any] = reference.token_logprobs
    orthogonalise: Callable[..., Any] = reference.orthogonalise


def _by_gradient(recorded: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """`recorded` in passes that will go backward, `otherwise` in the others."""

    @functools.wraps(recorded)
    def op(*args: Any, **named: Any) -> Any:
        return (recorded if torch.is_grad_enabled() else otherwise)(*args, **named)

    return op


REFERENCE = Ops(name="reference")
TORCH_CPU = Ops(
    name="torch_cpu",
    rms_norm=_by_gradient(torch_cpu.rms_norm, inference.rms_norm),
    add_rms_norm=_by_gradient(torch_cpu.add_rms_norm, inference.add_rms_norm),
    rotate=_by_gradient(torch_cpu.rotate, inference.rotate),
    attention=_by_gradient(torch_cpu.attention, inference.attention),
    latent_attention=_by_gradient(torch_cpu.latent_attention, inference.latent_attention),
    feed_forward=_by_gradient(torch_cpu.feed_forward, inference.feed_forward),
    experts=_by_gradient(torch_cpu.experts, inference.experts),
    token_logprobs=_by_gradient(torch_cpu.token_logprobs, reference.token_logprobs),
)


def compiled(variant: str) -> Ops | None:
    """The table of one build of the C++ kernels; None where it was not compiled or this CPU cannot run it."""
    library = load(variant)
    if library is None:
        return None
    kernels = CpuKernels(library, bf16_by_torch=variant in MULTIPLIES_BF16)
    return Ops(
        name=variant,
        linear=_by_gradient(kernels.linear, reference.linear),
        orthogonalise=kernels.orthogonalise,
        rms_norm=kernels.rms_norm,
        add_rms_norm=kernels.add_rms_norm,
        rotate=kernels.rotate,
        attention=_by_gradient(kernels.attention, inference.attention),
        latent_attention=_by_gradient(kernels.latent_attention, inference.latent_attention),
        gate=kernels.gate,
        feed_forward=_by_gradient(kernels.feed_forward, inference.feed_forward),
        route=kernels.route,
        experts=_by_gradient(kernels.experts, inference.experts),
        token_logprobs=kernels.token_logprobs,
    )


@functools.cache
def tables() -> dict[str, Ops]:
    """All tables that run on this machine, fastest for the CPU first."""
    found = [table for table in map(compiled, VARIANTS) if table is not None]
    return {table.name: table for table in (*found, TORCH_CPU, REFERENCE)}


def select(runtime: Runtime, wanted: str | None = None) -> Ops:
    """Ops for this runtime; `wanted` forces one table by name. Raises RecipeError for an unknown name."""
    known = tables()
    name = wanted or (next(iter(known)) if runtime.device == "cpu" else "reference")
    if name not in known:
        raise RecipeError(f"ops = {name!r}: this machine has {', '.join(known)}")
    log.info("ops: %s on %s", name, runtime.device)
    if runtime.device == "cpu" and wanted is None and name == TORCH_CPU.name:
        log.warning("the C++ kernels are not built (no compiler at installation?): training takes longer without them")
    return known[name]
