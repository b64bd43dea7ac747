"""The wall clock of a drill's service, which a fault can step: a small library shifts it (wall_clock.c says how)."""

import shutil
import subprocess
from importlib import resources
from pathlib import Path

from meerkat_mq.errors import DrillFailed

_SOURCE = resources.files("meerkat_mq.chaos") / "wall_clock.c"
_COMPILE_S = 60.0


def build_library(folder: Path) -> Path:
    """Compile the library into a folder; DrillFailed where there is no C compiler, or it fails. Blocks."""
    compiler, library = shutil.which("cc") or shutil.which("gcc"), folder / "wall_clock.so"
    if compiler is None:
        raise DrillFailed("clock-step", "needs a C compiler, and none is installed", "install your system's gcc")
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(_SOURCE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DrillFailed("clock-step", f"{compiler} does not run ({error})", "install your system's gcc") from error
    if done.returncode:
        problem = f"{compiler} fails ({done.stderr.strip().partition(chr(10))[0]})"
        raise DrillFailed("clock-step", problem, "install your system's gcc and its C library's headers")
    return library


class WallClock:
    """The clock of one service, also of the processes that are started in its place; its file holds the shift."""

    def __init__(self, library: Path, file: Path) -> None:
        self._library = library
        self._file = file
        self._file.write_bytes(bytes(8))

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a process whose clock this is."""
        return {"LD_PRELOAD": str(self._library), "MEERKAT_WALL_CLOCK": str(self._file)}

    def shift(self, by_s: float) -> None:
        """From now on it is so many seconds fast, or slow where that is negative."""
        with self._file.open("r+b") as file:  # in place: processes have it mapped
            file.write(round(by_s).to_bytes(8, "little", signed=True))
