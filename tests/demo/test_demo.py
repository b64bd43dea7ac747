"""The whole demo in small: broker, server, two node processes, report, export."""

import asyncio
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from meerkat_mq.demo import run as demo
from meerkat_mq.demo.plan import Choices, DemoPlan, make_plan
from meerkat_mq.demo.settings import WEIGHTS
from meerkat_mq.observe.live import Live
from meerkat_mq.observe.report import Report
from meerkat_mq.wire.difference import Difference


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meerkat_mq", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def _but_the_time(page: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", page)


async def test_an_interrupted_demo_says_how_its_page_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupted(plan: DemoPlan, out: Path, live: Live) -> Report:
        (out / "server").mkdir()
        if ledger:
            (out / "server" / "ledger.sqlite").touch()
        raise asyncio.CancelledError

    monkeypatch.setattr(demo, "_federate", interrupted)
    monkeypatch.setattr(demo, "configure_logs", lambda *, as_json, file: file.close())
    for ledger in (True, False):
        out = tmp_path / f"my demo {ledger}"
        out.mkdir()
        console = Console(file=io.StringIO(), width=40)
        with pytest.raises(asyncio.CancelledError):
            await demo.run_demo(make_plan(Choices()), out, console)
        assert isinstance(console.file, io.StringIO)
        said = console.file.getvalue()
        assert (f"meerkat report '{out}/server'\n" in said) is ledger


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
    assert len(re.findall(r'class="curve n\d( stopped)?"', report)) == 2
    again = run("report", str(out / "server"), "--out", str(out / "again.html"))
    assert again.returncode == 0, again.stderr
    assert _but_the_time((out / "again.html").read_text(encoding="utf-8")) == _but_the_time(report)
    difference = Difference.load(out / "server" / "difference.mkd")
    assert difference.version == 6

    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = run("demo", *chosen, "--out", str(out))
    assert again.returncode == 2
    assert again.stderr == f"meerkat: --out {out}: is not empty; name a new folder, or remove what is there\n"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == kept

    tuned = tmp_path / "tuned"
    exported = run(
        "export", "--model", str(WEIGHTS), "--difference", str(out / "server" / "difference.mkd"), "--out", str(tuned)
    )
    assert exported.returncode == 0, exported.stderr
    base = dict(AutoModelForCausalLM.from_pretrained(WEIGHTS).named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(tuned).named_parameters())
    changed = sum(int((base[name] != after[name]).sum()) for name in base)
    assert 0 < changed <= difference.mask.size
