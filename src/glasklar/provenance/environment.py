"""What a run was made with: code, installed versions, machine, flags. No paths, no names of users or hosts."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = "glasklar"
_ROOT = Path(__file__).resolve().parents[1]
# Variables that change the bits of a result (docs of PyTorch, oneDNN, MKL and cuBLAS).
_FLAGS = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
)
_GIT_SECONDS = 10


def describe_environment(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Part of the ledger's `run` event, beside `Runtime.describe()`.

    environ    the process environment by default; only variables that change the bits of a result are kept
    """
    environ = os.environ if environ is None else environ
    return {
        "code": code_identity(),
        "packages": installed_versions(),
        "hardware": hardware(),
        "flags": {name: environ[name] for name in _FLAGS if name in environ},
    }


def code_identity(root: Path = _ROOT) -> dict[str, Any]:
    """Which code runs: version, one hash over the package's files and, if it is a git checkout, what git calls it.

    git    commit, its tree, dirty (tracked or new files of the package differ from it); None where git does not track
           the package or does not answer
    """
    return {"version": _version(PACKAGE), "files": files_hash(root), "git": _git_identity(root)}


def files_hash(root: Path = _ROOT) -> str:
    """SHA-256 over the names and contents of all files below `root`, byte code and build results aside: what a compiler
    makes of the same source differs from machine to machine."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*"), key=lambda path: path.relative_to(root).as_posix()):
        built = {"__pycache__", "build"} & set(path.relative_to(root).parts) or path.suffix in (".so", ".pyd")
        if path.is_file() and not built:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(root).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def installed_versions(package: str = PACKAGE) -> dict[str, str]:
    """Versions of the package's dependencies and theirs, as installed, extras aside."""
    found: dict[str, str] = {}
    waiting = [package]
    while waiting:
        name = _normal(waiting.pop())
        if name in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a dependency of other systems or Python versions
        found[name] = distribution.version
        needed = [line for line in distribution.requires or [] if "extra ==" not in line]
        waiting += [match[0] for line in needed if (match := re.match(r"[\w.-]+", line))]
    return dict(sorted(found.items()))


def hardware() -> dict[str, Any]:
    """cores: logical ones. memory_bytes: of the machine; None where the system does not say."""
    pages = {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if pages else None
    return {"cores": os.cpu_count(), "memory_bytes": memory}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _git_identity(root: Path) -> dict[str, Any] | None:
    # A package installed inside somebody else's checkout is not described by that checkout: its files are not tracked.
    if not _git(root, "ls-files", "--", "."):
        return None
    commit, tree = _git(root, "rev-parse", "HEAD"), _git(root, "rev-parse", "HEAD^{tree}")
    status = _git(root, "status", "--porcelain", "--", ".")
    if not commit or not tree or status is None:
        return None
    return {"commit": commit, "tree": tree, "dirty": bool(status)}


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command, None where it fails. Takes no lock, runs no hook or monitor, reads no GIT_ variables."""
    program = shutil.which("git")
    if program is None:
        return None
    options = ["--no-optional-locks", "-c", "safe.directory=*", "-c", "core.fsmonitor=false"]
    try:
        done = subprocess.run(
            [program, *options, *arguments], cwd=root, env={}, capture_output=True, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None
