from pathlib import Path

import pytest

from meerkat_mq.sweep.energy import Energy, EnergyMeter

RANGE = 1_000_000


class Machine:
    """A folder like /sys/class/powercap, and a file like /proc/stat."""

    def __init__(self, folder: Path, packages: int) -> None:
        self.powercap, self.stat = folder / "powercap", folder / "stat"
        self.powercap.mkdir()
        for package in range(packages):
            self.count(package, 0)
        self.busy(0)
        part = self.powercap / "intel-rapl:0:0"  # of a package: already counted there
        part.mkdir()
        (part / "energy_uj").write_text("77")

    def count(self, package: int, microjoules: int) -> None:
        folder = self.powercap / f"intel-rapl:{package}"
        folder.mkdir(exist_ok=True)
        (folder / "energy_uj").write_text(f"{microjoules}\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")

    def busy(self, seconds: float) -> None:
        idle = 12345
        self.stat.write_text(f"cpu  {seconds * 100:.0f} 0 0 {idle} {idle} 0 0 0 55 0\ncpu0 1 2 3\n")

    def meter(self) -> EnergyMeter:
        return EnergyMeter(self.powercap, self.stat)


def test_packages_are_added(tmp_path: Path) -> None:
    machine = Machine(tmp_path, packages=2)
    meter = machine.meter()
    machine.count(0, 300_000)
    machine.count(1, 200_000)
    machine.busy(2.0)
    assert meter.used(cpu_seconds=2.0, watts=15) == Energy(0.5, "rapl")


def test_counters_wrap_around(tmp_path: Path) -> None:
    machine = Machine(tmp_path, packages=1)
    machine.count(0, 900_000)
    meter = machine.meter()
    for value in (100_000, 800_000, 50_000):
        machine.count(0, value)
        meter.sample()
    machine.busy(1.0)
    found = meter.used(cpu_seconds=1.0, watts=15)
    assert found.source == "rapl"
    assert found.joules == pytest.approx(0.2 + 0.7 + 0.25)


def test_a_process_pays_for_its_share(tmp_path: Path) -> None:
    machine = Machine(tmp_path, packages=1)
    machine.busy(100.0)
    meter = machine.meter()
    machine.count(0, 800_000)
    machine.busy(104.0)
    assert meter.used(cpu_seconds=1.0, watts=15).joules == pytest.approx(0.2)


def test_without_counters_it_is_an_estimate(tmp_path: Path) -> None:
    assert Machine(tmp_path, packages=0).meter().used(cpu_seconds=3.0, watts=15) == Energy(45.0, "estimate")


def test_a_gpu_is_not_in_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path, packages=1)
    meter = machine.meter()
    machine.count(0, 500_000)
    machine.busy(2.0)
    assert meter.used(cpu_seconds=2.0, watts=15, device="cuda") == Energy(0.5, "cpu only")
    assert EnergyMeter(tmp_path / "none").used(2.0, 15, "cuda:1") == Energy(30.0, "cpu only")


def test_counters_that_may_not_be_read(tmp_path: Path) -> None:
    machine = Machine(tmp_path, packages=1)
    (machine.powercap / "intel-rapl:0" / "energy_uj").unlink()
    assert machine.meter().used(cpu_seconds=1.0, watts=10) == Energy(10.0, "estimate")
    assert EnergyMeter(tmp_path / "none", tmp_path / "none").used(1.0, 10) == Energy(10.0, "estimate")
