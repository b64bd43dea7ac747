"""Damaged model folders: used, or refused in one line; never a traceback, a print, another file, or gigabytes."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.model_files import KINDS, good_folders
from tests.fuzz.mutate import COUNT

EACH = max(COUNT // 6, 12) if COUNT < 1000 else COUNT  # a model takes a hundred times as long as a task
SHOWN = 5


def look(root: Path, kind: str, start: int) -> tuple[list[dict[str, Any]], str]:
    """Reports on the mutants from `start` on; and why there are no more."""
    command = [sys.executable, "-m", "tests.fuzz.look_at_models", str(root), kind, str(start), str(EACH)]
    home = root.parent / "home"
    settings = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
    here = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | settings | here, check=False)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    printed = (root.parent / "printed.txt").read_text(errors="replace")
    return reports, f"the process ended ({done.returncode}): {printed[-2000:]}" if done.returncode else ""


@pytest.mark.timeout(600 + 2 * EACH)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_models(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "root"
    (root / "outside").mkdir(parents=True)
    (root / "outside" / "secret.json").write_text("{}")
    good_folders(root / "good")
    faults: list[str] = []
    outcomes = Counter[str]()
    start = 0
    while start < EACH:
        reports, end = look(root, kind, start)
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
