"""The whole demo in small: broker, server, two node processes, report, export."""

import asyncio
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from meerkat_mq.demo import plan
from meerkat_mq.demo import run as demo
from meerkat_mq.demo.plan import Choices, DemoPlan, make_plan
from meerkat_mq.demo.settings import DEMO, WEIGHTS
from meerkat_mq.observe.live import Live
from meerkat_mq.observe.report import Report
from meerkat_mq.wire.snapshot import Difference
from tests.support.command import Meerkat


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
def test_the_demo_ends_by_itself_with_equal_digests_and_a_model_to_export(
    meerkat: Meerkat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command in this process, the nodes in processes of their own; every part is there, each smaller."""
    short = DEMO.early_stopping.model_copy(update={"calibration_steps": 8})
    small = {"held_out_rows": 500, "calibration_sequences": 8, "calibration_lines": 200, "bound_steps": 5}
    monkeypatch.setattr(plan, "DEMO", replace(DEMO, early_stopping=short, **small))
    out = tmp_path / "out"
    chosen = ("--nodes", 2, "--rounds", 2, "--local-steps", 2, "--early-stopping", "random")
    done = meerkat("demo", *chosen, "--out", out)
    assert done.code == 0, done.err
    assert "✓ 2 of 2: nodes hold its weights, bit for bit" in done.out
    assert re.search(r"held-out accuracy .*, from 5\d\.\d %", done.out)
    assert re.search(r"early stopping +1 of 2 nodes early-stopped by random: node-[01]", done.out)
    assert "\x1b" not in done.out
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in report
    assert len(re.findall(r'class="curve n\d( stopped)?"', report)) == 2
    again = meerkat("report", out / "server", "--out", out / "again.html")
    assert again.code == 0, again.err
    assert _but_the_time((out / "again.html").read_text(encoding="utf-8")) == _but_the_time(report)
    difference = Difference.load(out / "server" / "difference.mkd")
    assert difference.version == 2

    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = meerkat("demo", *chosen, "--out", out)
    assert again.code == 2
    assert again.err == f"meerkat: --out {out}: is not empty; name a new folder, or remove what is there\n"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == kept

    tuned = tmp_path / "tuned"
    exported = meerkat("export", "--model", WEIGHTS, "--difference", out / "server" / "difference.mkd", "--out", tuned)
    assert exported.code == 0, exported.err
    base = dict(AutoModelForCausalLM.from_pretrained(WEIGHTS).named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(tuned).named_parameters())
    changed = sum(int((base[name] != after[name]).sum()) for name in base)
    assert 0 < changed <= difference.mask.size
