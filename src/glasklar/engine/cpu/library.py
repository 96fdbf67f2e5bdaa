"""Finds, loads and declares the compiled pass (network.cpp): C functions on plain pointers, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from typing import Any, Literal, get_args

from glasklar.errors import CapacityError

# Fastest first, with the level of CPU that each needs (`glasklar_tier`).
VARIANTS = {"avx512": 3, "vnni": 2, "avx2": 1, "plain": 0}

p, i32, i64, f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Struct(ctypes.Structure):
    """A C struct; values are given by name, and what keeps their memory alive stays in `kept`."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.kept: list[Any] = []


class Matrix(Struct):
    """matrix.hpp: packed weights of `copies` matrices [outputs, inputs]."""

    _fields_ = [("data", p), ("bias", p), ("kind", i32), ("outputs", i32), ("inputs", i32), ("copies", i32)]


class Embedding(Struct):
    """network.hpp"""

    _fields_ = [("rows", p), ("narrow", i64)]


CacheKind = Literal["int16", "float32", "int8"]
CACHES = get_args(CacheKind)  # in the order of `CacheKind` in network.hpp

_SHAPE = (
    "layers", "width", "heads", "kv_heads", "latent", "q_latent", "nope", "rope", "value", "vocabulary", "experts",
    "active", "groups", "groups_kept", "sigmoid", "normalise", "interleave", "page", "cache", "max_tokens",
)  # fmt: skip
_FACTORS = ("scaling", "eps", "latent_eps", "softmax_scale", "swiglu_alpha", "swiglu_limit")
_VECTORS = (
    "attention_norm", "feed_norm", "q_latent_norm", "latent_norm", "q_norm", "k_norm", "sinks", "router_bias",
)  # fmt: skip
_MATRICES = (
    "q", "q_up", "kv", "k_up", "v_up", "out", "gate_up", "down", "router", "experts_gate_up", "experts_down",
)  # fmt: skip


class Shape(Struct):
    """network.hpp"""

    _fields_ = [
        *((name, i32) for name in _SHAPE),
        *((name, f32) for name in _FACTORS),
    ]


class Layer(Struct):
    """network.hpp"""

    _fields_ = [
        *((name, p) for name in _VECTORS),
        *((name, Matrix) for name in _MATRICES),
        *((name, i32) for name in ("window", "hidden", "expert_hidden", "unused")),
    ]


class Draft(Struct):
    """network.hpp"""

    _fields_ = [("embedding_norm", p), ("state_norm", p), ("final_norm", p), ("join", Matrix)]


class Pass(Struct):
    """network.hpp"""

    _fields_ = [
        ("tokens", i32), ("outputs", i32), ("ids", p), ("positions", p), ("sequences", p), ("tables", p), ("cache", p),
        ("layer_stride", i64), ("cosine", p), ("sine", p), ("output_tokens", p), ("logits", p), ("temperatures", p),
        ("uniforms", p), ("chosen", p), ("logprobs", p), ("states", p), ("hidden", p),
    ]  # fmt: skip


VERSION = 5  # of network.cpp
SIZES = [ctypes.sizeof(struct) for struct in (Matrix, Embedding, Shape, Layer, Draft, Pass)]

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "glasklar_tier": (i32, []),
    "glasklar_layout": (None, [p]),
    "glasklar_network": (p, [p, p, p, p, p, p, i32, p]),
    "glasklar_free": (None, [p]),
    "glasklar_pass": (None, [p, p]),
    "glasklar_row_bytes": (i32, [p]),
    "glasklar_tile_bytes": (i64, [i32, i32]),
    "glasklar_read_singly": (None, [p, i64]),
    "glasklar_digest": (ctypes.c_uint64, [p, i64]),
    "glasklar_pack": (None, [i32, i32, p, i64, i32, i32, i32, i32, p]),
    "glasklar_unpack": (None, [p, i32, p]),
    "glasklar_multiply": (None, [p, i32, i32, p, i32, p]),
}


@functools.cache
def load(variant: str) -> ctypes.CDLL | None:
    """One build of the pass, or None where it was not compiled or this CPU cannot run it."""
    # The plain build tells what the CPU can do; opening another one is safe only after that.
    plain = _open("plain")
    if plain is None or plain.glasklar_tier() < VARIANTS[variant]:
        return None
    return _open(variant)


def best() -> ctypes.CDLL | None:
    """The fastest build for this CPU; None on a machine that had no compiler at installation."""
    return next((library for library in map(load, VARIANTS) if library is not None), None)


@functools.cache
def _open(variant: str) -> ctypes.CDLL | None:
    spec = importlib.util.find_spec(f"{__package__}._{variant}")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    check_layout(library, variant, spec.origin)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def check_layout(library: ctypes.CDLL, variant: str, path: str) -> None:
    """Raises CapacityError for a library that was compiled from other sources than these declarations describe, or for
    another CPU than its name says: its numbers would be nonsense."""
    wanted = [VERSION, VARIANTS[variant], *SIZES]
    found = (i32 * len(wanted))()
    ask = getattr(library, "glasklar_layout", None)
    if ask is not None:
        ask(found)
    if list(found) != wanted:
        raise CapacityError(f"{path}: compiled for another version of glasklar; install the package again (make setup)")
