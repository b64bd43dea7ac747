"""The whole demo in small: broker, server, two node processes, report, export."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from meerkat_mq.demo.settings import WEIGHTS
from meerkat_mq.wire.difference import Difference


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meerkat_mq", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.timeout(300)
def test_the_demo_ends_by_itself_with_equal_digests_and_a_model_to_export(tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen = ("--nodes", "2", "--rounds", "6", "--local-steps", "2", "--early-stopping", "random")
    done = run("demo", *chosen, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "all 2 nodes hold the server's weights, bit for bit" in done.stdout
    assert re.search(r"accuracy +5\d\.\d %", done.stdout)
    assert re.search(r"stopped +1 of 2 nodes, by random: node-[01]", done.stdout)
    assert "\x1b" not in done.stdout
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in report
    assert len(re.findall(r'class="curve c\d( stopped)?"', report)) == 2
    difference = Difference.load(out / "server" / "difference.mkd")
    assert difference.version == 6

    tuned = tmp_path / "tuned"
    exported = run(
        "export", "--model", str(WEIGHTS), "--difference", str(out / "server" / "difference.mkd"), "--out", str(tuned)
    )
    assert exported.returncode == 0, exported.stderr
    base = dict(AutoModelForCausalLM.from_pretrained(WEIGHTS).named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(tuned).named_parameters())
    changed = sum(int((base[name] != after[name]).sum()) for name in base)
    assert 0 < changed <= difference.mask.size
