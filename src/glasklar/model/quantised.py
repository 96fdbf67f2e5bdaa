"""Weights in 8 and 4 bits as they are published, and the numbers that they stand for.

fp8     DeepSeek-V3: NAME [O, I] in e4m3 and NAME_scale_inv, one fp32 number to multiply with for each block of
        [128, 128] (arXiv 2412.19437 section 3.3.2; inference/kernel.py of the published code)
mxfp4   gpt-oss: NAME_blocks [E, O, I/32, 16], two numbers a byte, the lower four bits first, and NAME_scales
        [E, O, I/32], a power of two for 32 numbers, biased by 127 (OCP Microscaling Formats 1.0). NAME is [E, I, O]
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from glasklar.errors import CheckpointError
from glasklar.model.hf_config import read_json
from glasklar.model.tensor_file import FLOATS, PIECE, Stored, pieces, read_rows

# e2m1: a sign, two bits of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
GROUP, BIAS, NAN_SCALE = 32, 127, 255
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How a folder stores its matrices: `block` [rows, columns] shares a scale in fp8."""

    method: Literal["none", "fp8", "mxfp4"] = "none"
    block: tuple[int, int] = (1, 1)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of the network as the files hold it. `shape`: of the numbers that it stands for."""

    name: str
    shape: tuple[int, ...]
    data: Stored
    scale: Stored | None = None
    block: tuple[int, int] = (1, 1)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (self.scale.nbytes if self.scale else 0)

    @property
    def place(self) -> tuple[str, int]:
        """Where it lies, to read files from front to back."""
        return str(self.data.path), self.data.begin

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers: fp32 for those that are quantised, which loses nothing of them."""
        return self.data.dtype if self.scale is None else torch.float32

    def read(self, index: int | None = None) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """The numbers piece by piece, each with its place; with `index`, those of one entry of the first axis.

        Raises CheckpointError for a scale that is no number.
        """
        data, scale = self.data, self.scale
        if index is not None:
            data, scale = _entry(data, index), None if scale is None else _entry(scale, index)
        if scale is None:
            for first, last in pieces(data):
                rows = read_rows(data, first, last)
                yield ((slice(first, last),), rows) if data.shape else ((), rows[0])
        elif data.dtype == torch.uint8:
            yield from self._mxfp4(data, scale, index is None)
        else:
            yield from self._fp8(data, scale)

    def in_order(self) -> Iterator[Tensor]:
        """The numbers in pieces that follow one another in memory."""
        if self.data.dtype != torch.uint8:
            yield from (numbers for _, numbers in self.read())
            return
        for expert in range(self.shape[0]):
            whole = torch.empty(self.shape[1:])
            for place, numbers in self.read(expert):
                whole[place] = numbers
            yield whole

    def _fp8(self, data: Stored, scale: Stored) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        high, wide = self.block
        factors = read_rows(scale, 0, scale.shape[0])
        if not torch.isfinite(factors).all():
            raise self._no_number(scale, f"{self.name}{_SCALE}")
        for first, last in pieces(data, high):
            rows = read_rows(data, first, last).float()
            part = factors[first // high : math.ceil(last / high)]
            yield (
                (slice(first, last),),
                rows * part.repeat_interleave(high, 0)[: last - first].repeat_interleave(wide, 1)[:, : data.shape[1]],
            )

    def _mxfp4(self, data: Stored, scale: Stored, stacked: bool) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        if stacked:
            for expert in range(data.shape[0]):
                for place, part in self._mxfp4(_entry(data, expert), _entry(scale, expert), False):
                    yield (slice(expert, expert + 1), *place), part[None]
            return
        table = torch.tensor(E2M1)
        for first, last in pieces(data, size=PIECE // 4):
            packed, power = read_rows(data, first, last), read_rows(scale, first, last)
            if (power == NAN_SCALE).any():
                raise self._no_number(scale, f"{self.name}{_SCALES}")
            both = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
            numbers = torch.ldexp(table[both.int()], power[..., None].int() - BIAS)
            yield (slice(None), slice(first, last)), numbers.flatten(-2).mT

    def _no_number(self, scale: Stored, name: str) -> CheckpointError:
        return CheckpointError(f"{scale.path}: {name} holds a scale that is no number (NaN); fetch the file again")


def _entry(stored: Stored, index: int) -> Stored:
    return replace(stored, shape=stored.shape[1:], begin=stored.begin + index * stored.row_bytes)


def read_storage(folder: Path) -> Storage:
    """From config.json. Raises CheckpointError for a method that is not known here."""
    path = folder / "config.json"
    table = read_json(path).get("quantization_config")
    if table is None:
        return Storage()
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: quantization_config = {str(table)[:80]!r} is no object; mend it")
    match table.get("quant_method"):
        case "mxfp4":
            return Storage(method="mxfp4")
        case "fp8":
            return Storage(method="fp8", block=_block(table, path))
    raise CheckpointError(
        f"{path}: quantization by {str(table.get('quant_method'))[:80]!r} is not supported, only fp8 with blocks and "
        "mxfp4; take the model in bf16 or fp32"
    )


def _block(table: dict[str, Any], path: Path) -> tuple[int, int]:
    block = table.get("weight_block_size")
    sizes = isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n <= 1 << 20 for n in block)
    if not sizes or table.get("fmt", "e4m3") != "e4m3":
        raise CheckpointError(
            f"{path}: fp8 with weight_block_size = {str(block)[:40]}, fmt = {str(table.get('fmt'))[:40]!r}; only e4m3 "
            "with blocks [rows, columns] is supported: take the model in bf16 or fp32"
        )
    assert isinstance(block, list)
    return block[0], block[1]


def weights(stored: dict[str, Stored], storage: Storage) -> dict[str, Weight]:
    """The network's tensors by name, each with its scales. What belongs to none stays for itself, for the comparison
    with the configuration to find. Raises CheckpointError for a type, a shape or a lack that the format does not allow.
    """
    found: dict[str, Weight] = {}
    taken: set[str] = set()
    for name, data in stored.items():
        if data.dtype == torch.float8_e4m3fn:
            found[name] = _fp8(name, data, stored.get(name + _SCALE), storage)
            taken.add(name + _SCALE)
        elif storage.method == "mxfp4" and data.dtype == torch.uint8 and name.endswith(_BLOCKS):
            own = name.removesuffix(_BLOCKS)
            found[own] = _mxfp4(own, data, stored.get(own + _SCALES))
            taken |= {name, own + _SCALES}
    for name, data in stored.items():
        if name in taken or name in found:
            continue
        if data.dtype not in FLOATS.values():
            raise _wrong_type(name, data, storage)
        found[name] = Weight(name=name, shape=data.shape, data=data)
    return found


def _fp8(name: str, data: Stored, scale: Stored | None, storage: Storage) -> Weight:
    if storage.method != "fp8" or len(data.shape) != 2:
        raise _wrong_type(name, data, storage)
    wanted = tuple(math.ceil(size / part) for size, part in zip(data.shape, storage.block, strict=True))
    _check_scale(name + _SCALE, data, scale, torch.float32, wanted)
    return Weight(name=name, shape=data.shape, data=data, scale=scale, block=storage.block)


def _mxfp4(name: str, data: Stored, scale: Stored | None) -> Weight:
    if len(data.shape) != 4 or data.shape[-1] != GROUP // 2:
        raise CheckpointError(
            f"{data.path}: {name}{_BLOCKS} has the shape {list(data.shape)}, not [experts, rows, groups, "
            f"{GROUP // 2}]; fetch the file again"
        )
    _check_scale(name + _SCALES, data, scale, torch.uint8, data.shape[:3])
    experts, rows, groups, _ = data.shape
    return Weight(name=name, shape=(experts, groups * GROUP, rows), data=data, scale=scale)


def _check_scale(name: str, data: Stored, scale: Stored | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if scale is None:
        raise CheckpointError(
            f"{data.path}: lacks {name[:120]}, the scales of a quantised tensor; fetch the model again"
        )
    if scale.shape != shape or scale.dtype != dtype:
        raise CheckpointError(
            f"{scale.path}: {name[:120]} has the shape {list(scale.shape)} and the type {scale.dtype}, asked for is "
            f"{list(shape)} and {dtype}; fetch the file again"
        )


def _wrong_type(name: str, data: Stored, storage: Storage) -> CheckpointError:
    return CheckpointError(
        f"{data.path}: {name[:120]} of shape {list(data.shape)} has the type {data.dtype}, for which config.json "
        f"(quantization: {storage.method}) has no use; take the model in bf16 or fp32, or fetch it again"
    )
