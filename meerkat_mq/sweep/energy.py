"""Energy of a stretch of work: measured by the processor (RAPL) where it may be read, else estimated."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

POWERCAP = Path("/sys/class/powercap")
STAT = Path("/proc/stat")
_IDLE = (3, 4)  # columns of /proc/stat: idle, iowait
_COLUMNS = 8  # guests are counted in "user" already
_TICKS = 100  # a second, in /proc/stat, on every Linux


@dataclass(frozen=True)
class Energy:
    """Joules, and whether they were measured ("rapl"), come from CPU-seconds ("estimate") or leave a GPU out."""

    joules: float
    source: Literal["rapl", "estimate", "cpu only"]


@dataclass
class EnergyMeter:
    """Counts from its making on; `sample` at least once in half an hour, since the counters wrap around.

    Attributes:
        microjoules: of all processor packages so far; None where no counter can be read.
    """

    powercap: Path = POWERCAP
    stat: Path = STAT
    microjoules: int | None = 0

    def __post_init__(self) -> None:
        """Start counting."""
        self._last = _counters(self.powercap)
        self._busy = _busy_seconds(self.stat)

    def sample(self) -> None:
        """Add what the counters have moved since the last look."""
        now = _counters(self.powercap)
        if self.microjoules is None or not now or now.keys() != self._last.keys():
            self.microjoules = None
            return
        for package, value in now.items():
            moved = value - self._last[package]
            self.microjoules += moved if moved >= 0 else moved + _number(package / "max_energy_range_uj")
        self._last = now

    def used(self, cpu_seconds: float, watts: float, device: str = "cpu") -> Energy:
        """Of a process that worked so long: its share of the packages' energy by CPU time, or CPU time × watts.

        `watts` are those of one busy core; the energy of a device that is not "cpu" is not in it.
        """
        self.sample()
        if not self.microjoules:
            return Energy(cpu_seconds * watts, "estimate" if device == "cpu" else "cpu only")
        busy = _busy_seconds(self.stat)
        all_busy = busy - self._busy if busy is not None and self._busy is not None else cpu_seconds
        share = min(1.0, cpu_seconds / all_busy) if all_busy > 0 else 1.0
        return Energy(share * self.microjoules / 1e6, "rapl" if device == "cpu" else "cpu only")


def _counters(powercap: Path) -> dict[Path, int]:
    """Microjoules of each package; empty where one cannot be read."""
    packages = sorted(path for path in powercap.glob("intel-rapl:*") if path.name.count(":") == 1)
    found = {package: _number(package / "energy_uj", -1) for package in packages}
    return {} if -1 in found.values() else found


def _number(file: Path, otherwise: int = 0) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return otherwise


def _busy_seconds(stat: Path) -> float | None:
    """CPU-seconds of the whole machine since it started."""
    try:
        ticks = [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1 : 1 + _COLUMNS]]
    except (OSError, ValueError):
        return None
    return (sum(ticks) - sum(ticks[column] for column in _IDLE)) / _TICKS
