"""Energy of a stretch of work: counters where the machine has them, otherwise an estimate that says so.

CPU    RAPL counters under /sys/class/powercap (Intel and AMD; most kernels let only root read them): whole packages
       and DRAM, other programs on the machine included
GPU    NVML's energy counter, where pynvml is installed: whole boards
else   estimate: CPU seconds of this process times WATTS_PER_CORE
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

# A server core under load with its share of memory, fans and power supply: 10 W (a 64-core machine draws 500 to 700 W
# at the plug; laptop cores take 3 to 6 W).
WATTS_PER_CORE = 10.0
JOULES_PER_KWH = 3.6e6
USD_PER_KWH = 0.30  # as in `glasklar plan`: electricity alone
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True, kw_only=True)
class Energy:
    """joules: used between `start` and `stop`. source: "rapl", "nvml", "rapl+nvml" or "estimate". coverage: share of
    the devices at work whose energy was counted and not estimated. boundary: what the figure takes in."""

    joules: float
    source: str
    coverage: float
    boundary: str

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def cost(self) -> dict[str, float]:
        """What the electricity cost, and at which price."""
        return {"usd": self.joules / JOULES_PER_KWH * USD_PER_KWH, "usd_per_kwh": USD_PER_KWH}


class Counter(Protocol):
    """`read` gives the joules since some moment in the past; only differences mean something."""

    device: str
    source: str
    boundary: str

    def read(self) -> float: ...


class Rapl:
    """Sum of the package and DRAM domains. Counters wrap after minutes to hours; `read` at least once in a while."""

    device, source = "CPU", "rapl"
    boundary = "CPU packages and DRAM"

    def __init__(self, domains: list[Path]) -> None:
        self._files = [domain / "energy_uj" for domain in domains]
        self._ranges = [_number(domain / "max_energy_range_uj") for domain in domains]
        self._last = [_number(file) for file in self._files]
        self._total = 0

    @classmethod
    def find(cls, root: Path = POWERCAP) -> Rapl | None:
        """None where there are no counters or they may not be read."""
        domains = [path for path in sorted(root.glob("intel-rapl:*")) if _is_counted(path)]
        try:
            return cls(domains) if domains else None
        except (OSError, ValueError):
            return None

    def read(self) -> float:
        for index, file in enumerate(self._files):
            now = _number(file)
            self._total += (now - self._last[index]) % (self._ranges[index] + 1)
            self._last[index] = now
        return self._total / 1e6


class Nvml:
    """Sum over the GPUs that NVML shows."""

    device, source = "GPU", "nvml"
    boundary = "GPU boards"

    def __init__(self, library: Any) -> None:
        library.nvmlInit()
        handles = [library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())]
        self._read = lambda: sum(library.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1e3
        self._read()

    @classmethod
    def find(cls) -> Nvml | None:
        """None without pynvml, without a driver, or on a GPU without this counter (before Volta)."""
        try:
            library = importlib.import_module("pynvml")
        except ImportError:
            return None
        try:
            return cls(library)
        except library.NVMLError:
            return None

    def read(self) -> float:
        return self._read()


class Estimate:
    """CPU seconds of this process and its children times a documented power. Knows nothing of GPUs."""

    device, source = "CPU", "estimate"
    boundary = f"CPU seconds of this process x {WATTS_PER_CORE:g} W"

    def __init__(self, cpu_seconds: Callable[[], float] = lambda: sum(os.times()[:4])) -> None:
        self._cpu_seconds = cpu_seconds

    def read(self) -> float:
        return self._cpu_seconds() * WATTS_PER_CORE


class EnergyMeter:
    """Counts from `start` to `stop`; may be started again.

    device      "cpu" or "cuda", as in `Runtime`: what is at work
    counters    what to count with; by default what this machine offers

    A GPU at work that nothing counts halves the coverage and is named in the boundary.
    """

    def __init__(self, device: str = "cpu", *, counters: Sequence[Counter] | None = None) -> None:
        self._counters = find_counters(device) if counters is None else list(counters)
        devices = {"CPU", "GPU"} if device == "cuda" else {"CPU"}
        missing = devices - {counter.device for counter in self._counters}
        counted = {counter.device for counter in self._counters if counter.source != "estimate"}
        self._coverage = len(counted) / len(devices)
        self._boundary = ", ".join([c.boundary for c in self._counters] + [f"without the {name}" for name in missing])
        self._begin: list[float] | None = None

    def start(self) -> Self:
        self._begin = [counter.read() for counter in self._counters]
        return self

    def stop(self) -> Energy:
        """Energy since `start`, which has to come first."""
        assert self._begin is not None, "stop() without start()"
        joules = sum(counter.read() - begin for counter, begin in zip(self._counters, self._begin, strict=True))
        self._begin = None
        return Energy(
            joules=joules,
            source="+".join(counter.source for counter in self._counters),
            coverage=self._coverage,
            boundary=self._boundary,
        )


def find_counters(device: str) -> list[Counter]:
    """For the CPU its counters or the estimate; for a GPU its counter, where there is one."""
    counters: list[Counter] = [Rapl.find() or Estimate()]
    if device == "cuda" and (gpu := Nvml.find()):
        counters.append(gpu)
    return counters


def _is_counted(domain: Path) -> bool:
    """Packages and DRAM. Core and uncore lie within the package, psys around everything: adding them counts twice."""
    try:
        name = (domain / "name").read_text().strip()
    except OSError:
        return False
    return name.startswith("package") or name == "dram"


def _number(path: Path) -> int:
    return int(path.read_text())
