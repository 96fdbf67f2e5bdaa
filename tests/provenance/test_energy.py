"""Oracle: counters written by hand into a folder that looks like /sys/class/powercap."""

import sys
from types import SimpleNamespace

import pytest

from glasklar.provenance.energy import WATTS_PER_CORE, EnergyMeter, Estimate, Nvml, Rapl

DOMAINS = {
    "intel-rapl:0": ("package-0", 1_000_000),
    "intel-rapl:0:0": ("core", 900_000),
    "intel-rapl:0:1": ("dram", 500_000),
    "intel-rapl:1": ("psys", 5_000_000),
}


@pytest.fixture
def powercap(tmp_path):
    for name, (label, value) in DOMAINS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(label + "\n")
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("9999999\n")
    return tmp_path


def test_rapl_counts_packages_and_memory_once(powercap):
    counter = Rapl.find(powercap)
    assert counter is not None
    meter = EnergyMeter(counters=[counter]).start()
    for name in DOMAINS:
        (powercap / name / "energy_uj").write_text("3000000\n")
    energy = meter.stop()
    assert energy.joules == pytest.approx(2.0 + 2.5)
    assert (energy.source, energy.coverage) == ("rapl", 1.0)


def test_rapl_counter_that_wraps(powercap):
    counter = Rapl.find(powercap)
    assert counter is not None
    before = counter.read()
    (powercap / "intel-rapl:0" / "energy_uj").write_text("0\n")
    assert counter.read() - before == pytest.approx((10_000_000 - 1_000_000) / 1e6)


def test_unreadable_counters_are_no_counters(powercap, tmp_path):
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    assert Rapl.find(powercap) is None
    assert Rapl.find(tmp_path / "none") is None


def test_estimate_names_itself():
    seconds = iter([10.0, 12.5])
    meter = EnergyMeter(counters=[Estimate(lambda: next(seconds))]).start()
    energy = meter.stop()
    assert energy.joules == pytest.approx(2.5 * WATTS_PER_CORE)
    assert energy.record() == {
        "joules": energy.joules,
        "source": "estimate",
        "coverage": 0.0,
        "boundary": "CPU seconds of this process x 10 W",
    }


def test_gpu_that_nothing_counts_is_named():
    energy = EnergyMeter("cuda", counters=[Estimate(lambda: 0.0)]).start().stop()
    assert (energy.source, energy.coverage) == ("estimate", 0.0)
    assert energy.boundary.endswith("without the GPU")


def test_nvml_adds_all_boards(monkeypatch):
    millijoules = [1000, 2000]
    library = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda index: millijoules[index],
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    gpu = Nvml.find()
    assert gpu is not None
    meter = EnergyMeter("cuda", counters=[Estimate(lambda: 0.0), gpu]).start()
    millijoules[:] = [4000, 2500]
    energy = meter.stop()
    assert energy.joules == pytest.approx(3.5)
    assert (energy.source, energy.coverage) == ("estimate+nvml", 0.5)

    def no_driver():
        raise RuntimeError

    library.nvmlInit = no_driver
    assert Nvml.find() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Nvml.find() is None
