"""safetensors files read with nothing taken on trust, and written tensor by tensor.

8 bytes   length of the header, little endian
header    JSON: {"NAME": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, …, "__metadata__": {…}}
data      the tensors, without gaps
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasklar.errors import CheckpointError
from glasklar.model.hf_config import parse_json

MAX_HEADER_BYTES = 8 << 20  # some 70,000 tensors; a longer header can only mean to exhaust the memory
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES = {**FLOATS, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}
PIECE = 4 << 20  # bytes read at a time


@dataclass(frozen=True)
class Stored:
    """One tensor of a file; `begin`: its first byte there."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Of one step along the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


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
    first = 8 + length
    return {
        name: Stored(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), first + spans[name][0])
        for name, entry in table.items()
    }


def read_rows(stored: Stored, first: int, last: int) -> Tensor:
    """Rows [first, last) along the first axis, in a buffer of their own: mapped files would count as memory in use."""
    if not stored.shape:
        return read_rows(replace(stored, shape=(1,)), 0, 1)[0]
    raw = torch.empty((last - first) * stored.row_bytes, dtype=torch.uint8)
    try:
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.begin + first * stored.row_bytes)
            view, done = raw.numpy().data, 0
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise _damaged(stored.path, "it became shorter while it was read")
                done += got
    except OSError as error:
        raise CheckpointError(f"{stored.path}: cannot be read ({error.strerror}); fetch the file again") from None
    return raw.view(stored.dtype).view(last - first, *stored.shape[1:])


def pieces(stored: Stored, multiple: int = 1, size: int = PIECE) -> Iterator[tuple[int, int]]:
    """Runs of rows of some `size` bytes, each but the last a multiple of `multiple` rows; a scalar is one row."""
    rows = stored.shape[0] if stored.shape else 1
    step = max(1, size // max(1, stored.row_bytes) // multiple) * multiple
    yield from ((first, min(first + step, rows)) for first in range(0, rows, step))


def write_file(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    content: Callable[[str], Iterator[Tensor]],
    progress: Callable[[int, int], None],
) -> None:
    """Writes a file tensor by tensor, in the order of `tensors` (type and shape by name); `content` gives the numbers
    of one in pieces. `progress` is told bytes written and bytes in all. Raises OSError.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say it
    total = 0
    for name, (dtype, shape) in tensors.items():
        end = total + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [total, end]}
        total = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        done = 0
        for name, (dtype, _) in tensors.items():
            for piece in content(name):
                raw = piece.to(dtype).contiguous().flatten().view(torch.uint8)
                file.write(raw.numpy().data)
                done += raw.numel()
            assert done == header[name]["data_offsets"][1], f"{name}: {done} bytes"
            progress(done, total)


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
