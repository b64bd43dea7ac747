"""The firewall rules of docs/secure-a-federation.md, in a network namespace of their own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.broker.behind_firewall import CONNECTIONS, SOCKETS
from tests.broker.guarded import BROKERS

ALONE = ["unshare", "-n"]


def rules() -> str:
    guide = (BROKERS.parent / "docs/secure-a-federation.md").read_text(encoding="utf-8")
    section = guide.split("\n## Limit connections by source address\n")[1].split("\n## ")[0]
    return "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))


def attacked(folder: Path, *rules: str) -> dict[str, object]:
    command = [*ALONE, sys.executable, "-m", "tests.broker.behind_firewall", str(folder), *rules]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BROKERS.parent)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_sockets_that_say_nothing_keep_newcomers_out_unless_the_firewall_counts_them(tmp_path: Path) -> None:
    """Attack H5, without a certificate."""
    if shutil.which("nft", path="/usr/sbin:/usr/bin") is None:
        pytest.skip("nft is not installed")
    if subprocess.run([*ALONE, "nft", "list", "tables"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace can be made here")
    (tmp_path / "open").mkdir()
    (tmp_path / "counted").mkdir()
    assert attacked(tmp_path / "open") == {"sockets": SOCKETS, "newcomer": False}
    found = attacked(tmp_path / "counted", rules())
    assert found == {"sockets": 20, "newcomer": True}
    assert CONNECTIONS > 20
