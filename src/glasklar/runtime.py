"""The machine: device, precision, threads. Decided once at start, passed down; nobody below asks again."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Literal, cast, get_args

from glasklar.errors import RecipeError

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how numbers are computed.

    device     "cpu" or "cuda"
    compute    precision of weights and activations in the forward and backward pass; masters are always fp32
    threads    CPU threads of one operation; part of a run's identity, since it changes the bits of bf16 sums
    """

    device: Device = "cpu"
    compute: Precision = "bf16"
    threads: int = 2

    @property
    def dtype(self):  # -> torch.dtype; torch is imported late so that `prepare` can come first
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.compute]

    def describe(self) -> dict[str, object]:
        """What a stranger needs to know of the machine to repeat a run."""
        import torch

        return {
            "device": self.device,
            "compute": self.compute,
            "threads": self.threads,
            "cpu": _cpu_name(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if self.device == "cuda" else None,
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }


def prepare(threads: int | None = None, environ: dict[str, str] | None = None) -> int:
    """Sets what libraries read when they are loaded; call it before torch is imported. Returns the thread count.

    oneDNN compiles one primitive for every new shape of a bf16 product and forgets them beyond 1024; transparent huge
    pages halve the cost of first touches in virtual machines.
    """
    environ = os.environ if environ is None else environ  # type: ignore[assignment]
    assert environ is not None
    wanted = threads if threads is not None else environ.get("GLASKLAR_THREADS") or _cores()
    if not str(wanted).isdecimal() or int(wanted) < 1:
        source = "GLASKLAR_THREADS" if threads is None else "threads"
        raise RecipeError(f"{source} = {wanted}: at least one is needed; leave it out for all cores")
    count = int(wanted)
    environ["OMP_NUM_THREADS"] = environ["MKL_NUM_THREADS"] = str(count)
    environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said, lest it warn of every process that is started
    return count


def start(threads: int, device: Device | None = None, compute: Precision = "bf16") -> Runtime:
    """Sets up torch and returns the runtime. `device=None` takes GLASKLAR_DEVICE, else the GPU where there is one.

    Raises RecipeError where GLASKLAR_DEVICE names no device, or a GPU that is not there.
    """
    import torch

    torch.set_num_threads(threads)
    wanted = device or os.environ.get("GLASKLAR_DEVICE")
    if wanted not in (None, "", *get_args(Device)):
        source, known = "device" if device else "GLASKLAR_DEVICE", ", ".join(get_args(Device))
        raise RecipeError(f"{source} = {wanted!r}: use one of {known}, or leave it out")
    device = cast(Device, wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "device = 'cuda': this torch sees no GPU; use device = 'cpu' (GLASKLAR_DEVICE=cpu) or install"
            " a CUDA build of torch"
        )
    return Runtime(device=device, compute=compute, threads=threads)


def cores(threads: int) -> list[int]:
    """A CPU for each of `threads` threads to stay on while it works: where they are as many as this process may use.
    None where there is a choice, which the system makes better, where it does not tell, and with GLASKLAR_PIN=0.

    Raises RecipeError where GLASKLAR_PIN says anything else than 0 or 1.
    """
    wanted = os.environ.get("GLASKLAR_PIN", "1")
    if wanted not in ("0", "1"):
        raise RecipeError(f"GLASKLAR_PIN = {wanted!r}: 1 keeps threads on a CPU each, 0 does not")
    if wanted == "0" or not hasattr(os, "sched_getaffinity"):
        return []
    allowed = sorted(os.sched_getaffinity(0))
    return allowed if 1 < len(allowed) == threads else []


def resident_bytes(pid: int) -> int | None:
    """Memory that a process has in RAM; None where the system does not tell (no /proc)."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def peak_bytes() -> int:
    """Most memory that this process has had in RAM. (What getrusage says begins with the memory of the process that
    started it.) Raises OSError where the system does not tell: it needs Linux's /proc."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM:"))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"
