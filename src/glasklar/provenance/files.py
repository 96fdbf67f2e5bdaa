"""Writing to disk so that a kill, a crash or a full disk leaves either the old content or the new, never half of it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from glasklar.errors import CapacityError, CheckpointError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
TEMPORARY = ".tmp-"  # first letters of every name that may be left behind by a kill; `sweep` removes them


def disk_error(number: int | None, path: Path) -> CapacityError | CheckpointError:
    """The error a caller can act on for an errno met while writing `path`."""
    reason = os.strerror(number) if number else "unknown error"
    if number in _FULL:
        return CapacityError(
            f"{path}: no room to write ({reason}); free some space and repeat the command: nothing was overwritten"
        )
    if number in _FORBIDDEN:
        return CheckpointError(
            f"{path}: cannot be written ({reason}); make the folder writable or choose another one ("
            "of the user's data: $GLASKLAR_HOME)"
        )
    return CheckpointError(f"{path}: cannot be written ({reason}); mend the disk or choose another folder")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns OSError met inside into CapacityError (disk full) or CheckpointError (read-only, broken) about `path`."""
    try:
        yield
    except OSError as error:
        raise disk_error(error.errno, path) from error


def write_all(descriptor: int, content: bytes) -> None:
    """`os.write` until everything is written; a full disk may take only a part at a time. Raises OSError."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces the content of `path`: temporary file in the same folder, fsync, rename, fsync of the folder.

    Raises CapacityError where the disk is full, CheckpointError where the folder cannot be written.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with writing(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                write_all(descriptor, content)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file and syncs it. Not atomic: for a folder that appears as a whole. Errors as above."""
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        # The library gives the errno only within its message: "… (os error 28)".
        found = re.search(r"\(os error (\d+)\)", str(error))
        raise disk_error(int(found[1]) if found else None, path) from error
    with writing(path):
        sync(path)


def replace_folder(new: Path, folder: Path) -> None:
    """A rename replaces no folder that has content; the old one goes first. Raises OSError."""
    if folder.exists():
        remove_folder(folder)
    os.rename(new, folder)
    sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Out of sight in one step, then deleted: a kill in between leaves no half folder under a valid name."""
    gone = folder.with_name(f"{TEMPORARY}old-{os.getpid()}-{folder.name}")
    os.rename(folder, gone)
    shutil.rmtree(gone)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` at the end, or vanishes after an error."""
    temporary = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    with writing(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        yield temporary
        with writing(folder):
            sync(temporary)
            replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """fsync of a file or folder that is already written. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Removes what a killed process left behind half-written in `folder`. Only the owner of the folder may call it."""
    with writing(folder):
        for leftover in sorted(folder.glob(f"{TEMPORARY}*")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
