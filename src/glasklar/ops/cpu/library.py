"""Finds and loads the compiled kernels. They are C functions on plain pointers: nothing of torch is linked, and a
machine without a compiler installs and runs glasklar without them."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from glasklar.errors import CapacityError

# Table name -> extension module; fastest first, with the level of CPU that it needs (`glasklar_level` in kernels.cpp).
VARIANTS = {
    "cpu_avx512": ("_avx512", 3), "cpu_avx512_fp32": ("_avx512_fp32", 2), "cpu_avx2": ("_avx2", 1),
    "cpu_plain": ("_plain", 0),
}  # fmt: skip
# Builds for CPUs that multiply bf16 numbers as such; all others widen them to fp32.
MULTIPLIES_BF16 = ("cpu_avx512",)

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}

# Arguments of each function: p pointer, l int64, i int, f float.
BY_TYPE = {
    "rms_norm_forward": "plpppfpplli",
    "rms_norm_backward": "plppppppplli",
    "gate_forward": "pppllli",
    "gate_backward": "pppppp" + "llli",
    "join_keys": "ppp" + "pi",
    "split_keys": "ppp" + "pi",
    "rotate": "ppppp" + "fip" + "pi",
    "logprobs_forward": "ppppplli",
    "logprobs_backward": "ppppplli",
    "attention_forward": "ppppf" + "ppppp" + "i",
    "attention_backward": "ppppf" + "ppppppppp" + "i",
    "experts_forward": "ppppppp" + "ppp" + "pi",
    "experts_backward": "pppppp" + "pppp" + "ppp" + "pi",
    "feed_forward_forward": "ppppp" + "pi",
    "feed_forward_backward": "pppppppp" + "pi",
    "linear_forward": "ppp" + "pi",
    "linear_backward": "ppppp" + "pi",
}
FOR_FLOAT = {"route_forward": "ppppplpfi", "route_backward": "ppppplpfi", "orthogonalise": "plll" + "pii"}

KINDS = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}


class Library:
    """One compiled variant. `library("rotate", dtype)` is the C function for tensors of that type."""

    def __init__(self, path: str, built_for: int) -> None:
        handle = ctypes.CDLL(path)
        ask = getattr(handle, "glasklar_built_for", None)
        stale = CapacityError(
            f"{path}: compiled for another version of glasklar; install the package again (make setup)"
        )
        if ask is None or ask() != built_for:
            raise stale
        self.level: int = handle.glasklar_level()
        self._functions: dict[tuple[str, torch.dtype], Callable[..., None]] = {}
        names = [f"{name}_{suffix}" for name in BY_TYPE for suffix in SUFFIX.values()]
        if not all(hasattr(handle, name) for name in (*names, *FOR_FLOAT)):
            raise stale
        for name, kinds in BY_TYPE.items():
            for dtype, suffix in SUFFIX.items():
                self._functions[name, dtype] = _declare(handle, f"{name}_{suffix}", kinds)
        for name, kinds in FOR_FLOAT.items():
            self._functions[name, torch.float32] = _declare(handle, name, kinds)

    def __call__(self, name: str, dtype: torch.dtype) -> Callable[..., None]:
        try:
            return self._functions[name, dtype]
        except KeyError:
            raise TypeError(f"{name}: no kernel for {dtype}; use float32, bfloat16 or ops = 'torch_cpu'") from None


def _declare(handle: ctypes.CDLL, symbol: str, kinds: str) -> Callable[..., None]:
    function: Any = getattr(handle, symbol)
    function.argtypes = [KINDS[kind] for kind in kinds]
    function.restype = None
    return function


@functools.cache
def load(variant: str) -> Library | None:
    """The library of a variant, or None where it was not compiled or this CPU cannot run it."""
    module, level = VARIANTS[variant]
    # The plain build tells what the CPU can do; loading another one is safe only after that.
    plain = _open("_plain", 0)
    if plain is None or plain.level < level:
        return None
    return _open(module, level)


@functools.cache
def _open(module: str, built_for: int) -> Library | None:
    spec = importlib.util.find_spec(f"{__package__}.{module}")
    return None if spec is None or spec.origin is None else Library(spec.origin, built_for)
