"""What a safetensors file holds, read from its header with nothing taken on trust.

8 bytes   length of the header, little endian
header    JSON: {"NAME": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, …, "__metadata__": {…}}
data      the tensors, without gaps
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glasklar.errors import CheckpointError
from glasklar.model.hf_config import parse_json

MAX_HEADER_BYTES = 8 << 20  # some 70,000 tensors; a longer header can only mean to exhaust the memory
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name. Raises CheckpointError for whatever is not exactly as the format demands."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise _damaged(path, f"{size} bytes are fewer than the header announces: the file is cut off")
            if length > MAX_HEADER_BYTES:
                raise _damaged(path, f"a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are accepted")
            table = parse_json(file.read(length), path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); fetch the file again") from None
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(path, "its metadata is no object")
    spans = {name: _span(name, entry, path) for name, entry in table.items()}
    _check_cover(spans, size - 8 - length, path)
    return {name: Stored(path, DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in table.items()}


def _span(name: str, entry: Any, path: Path) -> tuple[int, int]:
    """First byte and last-plus-one of a tensor, which must be what its shape and type need."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of {name[:80]!r} must have dtype, shape and data_offsets alone")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path}: {name[:80]!r} has the type {str(entry['dtype'])[:20]!r}; only {', '.join(DTYPES)} can be loaded: "
            "take the model in one of these types"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_whole(shape) and _whole(offsets) and len(offsets) == 2):
        raise _damaged(path, f"{name[:80]!r} has shape {str(shape)[:40]} at {str(offsets)[:60]}")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[entry["dtype"]].itemsize
    if end - begin != needed:
        raise _damaged(path, f"{name[:80]!r} of shape {str(shape)[:40]} needs {needed} bytes and has {end - begin}")
    return begin, end


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def _check_cover(spans: dict[str, tuple[int, int]], size: int, path: Path) -> None:
    """Every byte belongs to exactly one tensor: no gap to hide something in, no overlap."""
    reached = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != reached:
            problem = "overlaps the tensor before it" if begin < reached else "leaves a gap before it"
            raise _damaged(path, f"{name[:80]!r} begins at byte {begin}, which {problem}")
        reached = end
    if reached != size:
        raise _damaged(path, f"its tensors need {reached} bytes and it has {size}")


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged ({why}); fetch the file again")
