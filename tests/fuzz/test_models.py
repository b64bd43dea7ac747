"""Damaged model folders: used, or refused in one line; never a traceback, a print, another file, or gigabytes."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.model_files import KINDS, good_folders
from tests.fuzz.mutate import COUNT

EACH = max(COUNT // 6, 12) if COUNT < 1000 else COUNT  # a model takes a hundred times as long as a task
SHOWN = 5


class Looker:
    """A process that looks at mutants, begun anew where one of them ends it: importing takes longer than most looks."""

    def __init__(self, root: Path) -> None:
        home = str(root.parent / "home")
        here = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        settings = {"HOME": home, "XDG_CACHE_HOME": home, "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
        self._root, self._settings = root, os.environ | settings | {"PYTHONPATH": here}
        self._process = self._begin()

    def _begin(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.fuzz.look_at_models", str(self._root)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=self._settings
        )

    def look(self, kind: str, start: int) -> tuple[list[dict[str, Any]], str]:
        """Reports on the mutants from `start` on; and why there are no more."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{kind} {start} {EACH}\n")
        reports: list[dict[str, Any]] = []
        for line in self._process.stdout:
            if line == "{}\n":
                return reports, ""
            reports.append(json.loads(line))
        printed = (self._root.parent / "printed.txt").read_text(errors="replace")
        end = f"the process ended ({self._process.wait()}): {printed[-2000:]}"
        self.close()
        self._process = self._begin()
        return reports, end

    def close(self) -> None:
        with self._process:
            self._process.kill()


@pytest.fixture(scope="module")
def looker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Looker]:
    root = tmp_path_factory.mktemp("models") / "root"
    (root / "outside").mkdir(parents=True)
    (root / "outside" / "secret.json").write_text("{}")
    good_folders(root / "good")
    made = Looker(root)
    yield made
    made.close()


@pytest.mark.timeout(600 + 2 * EACH)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_models(looker: Looker, kind: str) -> None:
    faults: list[str] = []
    outcomes = Counter[str]()
    start = 0
    while start < EACH:
        reports, end = looker.look(kind, start)
        for report in reports:
            outcomes[report.get("outcome", "begun")] += 1
            faults += [f"mutant {report['number']}: {fault}" for fault in report.get("faults", ())]
        begun = [report["begun"] for report in reports if "begun" in report]
        if end:
            faults.append(f"mutant {begun[-1] if begun else 'none'}: {end}")
        start = begun[-1] + 1 if begun else EACH
    assert not faults, "\n".join([f"{len(faults)} faults in {outcomes}", *faults[:SHOWN]])
    assert outcomes["loaded"] + outcomes["refused"] == EACH
    assert outcomes["refused"] > EACH // 5, "the damage does nothing"
    assert outcomes["loaded"] > 0 or EACH < 100, "no damage is small"
