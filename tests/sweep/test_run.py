"""Whole grids: resuming, failures, kills."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from rich.console import Console

from meerkat_mq.config import load_config
from meerkat_mq.errors import ConfigError, DataError, ModelError, RunError
from meerkat_mq.observe.signals import Interrupted
from meerkat_mq.sweep import run
from meerkat_mq.sweep.plan import SweepPlan
from meerkat_mq.sweep.results import RESULTS_FILE, TABLE_FILE
from meerkat_mq.sweep.run import Estimate, check_plan, run_sweep
from meerkat_mq.sweep.workers import Job, in_words
from tests.support.command import Meerkat
from tests.support.waiting import until
from tests.sweep import grids

PREPARING = ["identify", "make_baseline", "make_cell_mask", "make_cell_mask"]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> grids.WorkersHere:
    here = grids.WorkersHere()
    monkeypatch.setattr(run, "Workers", here)
    return here


@pytest.fixture
def sweep(tmp_path: Path, tiny_llama: Path) -> Callable[..., str]:
    """Run the small plan; returns what was shown."""

    def start(**changes: Any) -> str:
        shown = StringIO()
        plan = grids.plan(tmp_path, tiny_llama, **changes)
        run_sweep(plan, tmp_path / "out", 2, Console(file=shown, width=200))
        return shown.getvalue()

    return start


def rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / "out" / RESULTS_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_grid(tmp_path: Path, workers: grids.WorkersHere, sweep: Callable[..., str]) -> None:
    shown = sweep()
    assert workers.done == [*PREPARING, *["run_cell"] * 4]
    assert [(row["method"], row["seed"]) for row in rows(tmp_path)] == [
        ("chosen", 0), ("nothing", 0), ("chosen", 1), ("nothing", 1),
    ]  # fmt: skip
    assert "4 of 4  nothing, state, iid, seed 1: " in shown
    table = (tmp_path / "out" / TABLE_FILE).read_text()
    assert "| chosen | 1 | 0.01 | 2 |" in table


def test_what_is_finished_is_not_run_again(
    tmp_path: Path, workers: grids.WorkersHere, sweep: Callable[..., str]
) -> None:
    sweep()
    first = rows(tmp_path)
    workers.done.clear()
    sweep()
    assert workers.done == ["identify"]
    shown = sweep(seeds=[0, 1, 2])
    assert "4 of 6 cells are done already" in shown
    assert workers.done[1:] == ["identify", "make_cell_mask", "run_cell", "run_cell"]
    assert rows(tmp_path)[:4] == first
    assert len({row["key"] for row in rows(tmp_path)}) == len(rows(tmp_path)) == 6


def test_an_interrupted_grid_goes_on(tmp_path: Path, workers: grids.WorkersHere, sweep: Callable[..., str]) -> None:
    def interrupt(_: Job) -> None:
        if len(rows(tmp_path)) == 2:
            raise Interrupted(signal.SIGINT)

    workers.before_job = interrupt
    with pytest.raises(Interrupted):
        sweep()
    assert len(rows(tmp_path)) == 2
    workers.before_job = lambda _: None
    sweep()
    keys = [row["key"] for row in rows(tmp_path)]
    assert len(keys) == len(set(keys)) == 4


def test_a_failing_cell_is_tried_again(tmp_path: Path, workers: grids.WorkersHere, sweep: Callable[..., str]) -> None:
    workers.failing = {"run_cell"}
    with pytest.raises(RunError, match="4 of 4 cells failed"):
        sweep()
    assert [(row["failed"], row["trace"]) for row in rows(tmp_path)] == [("no luck today", "line 1\nline 2")] * 4
    workers.failing = set()
    sweep()
    assert ["failed" in row for row in rows(tmp_path)] == [True] * 4 + [False] * 4


def test_cells_without_their_mask_fail_alone(
    tmp_path: Path, workers: grids.WorkersHere, sweep: Callable[..., str]
) -> None:
    workers.failing = {"make_cell_mask"}
    with pytest.raises(RunError, match="2 of 4 cells failed"):
        sweep()
    assert {row["method"]: "failed" in row for row in rows(tmp_path)} == {"chosen": True, "nothing": False}
    assert {row.get("trace") for row in rows(tmp_path)} == {"line 1\nline 2", None}


def test_a_model_that_is_not_there(workers: grids.WorkersHere, sweep: Callable[..., str]) -> None:
    workers.failing = {"identify"}
    with pytest.raises(ModelError, match="no luck today"):
        sweep()


def test_one_sweep_a_folder(tmp_path: Path, workers: grids.WorkersHere, sweep: Callable[..., str]) -> None:
    def again(_: Job) -> None:
        workers.before_job = lambda _: None
        with pytest.raises(ConfigError, match="is in use by another sweep"):
            sweep()

    workers.before_job = again
    sweep()


def test_a_split_that_cannot_be_is_found_before_the_model(tmp_path: Path) -> None:
    plan = grids.plan(tmp_path, tmp_path / "no-model", nodes=60)
    with pytest.raises(Exception, match="60 nodes"):
        check_plan(plan)


def test_only_an_unexpected_error_leaves_a_trace() -> None:
    def fall() -> None:
        raise ValueError("no such thing\nmore of it")

    with pytest.raises(ValueError, match="no such thing") as raised:
        fall()
    words, trace = in_words(raised.value)
    assert words == "ValueError: no such thing"
    assert trace is not None
    assert "in fall" in trace
    assert in_words(DataError("rows.jsonl", "is empty")) == ("rows.jsonl: is empty", None)


def test_the_time_left() -> None:
    estimate = Estimate(processes=2)
    fast, slow = ("fast", "sst2"), ("slow", "sst2")
    assert estimate.left([fast], [(slow, 1.0, 0.0)]) is None
    assert estimate.left([], [(slow, 10.0, 0.5)]) == pytest.approx(10)
    estimate.add(fast, 4.0)
    estimate.add(fast, 6.0)
    assert estimate.left([fast, fast], []) == pytest.approx(5)
    assert estimate.left([fast], [(slow, 30.0, 0.75)]) == pytest.approx(10)


# --- real processes ---


def written(folder: Path, model: Path, **changes: Any) -> Path:
    table = grids.table(folder, model, **changes)
    (folder / "plan.toml").write_text(tomli_w.dumps(table))
    load_config(folder / "plan.toml", SweepPlan)
    return folder / "plan.toml"


def start(plan: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "meerkat_mq", "sweep", str(plan), "--out", str(out), "--processes", "2"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )  # fmt: skip


def descendants(pid: int) -> list[int]:
    with suppress(FileNotFoundError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [found for child in map(int, children) for found in (child, *descendants(child))]
    return []


@asynccontextmanager
async def running(plan: Path, out: Path) -> AsyncIterator[subprocess.Popen[str]]:
    """A sweep in processes of its own; in the end, none of them is left."""
    process = start(plan, out)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


async def all_end(family: list[int]) -> None:
    await until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in family), within_s=20)


@pytest.mark.timeout(240)
async def test_a_kill_mid_grid(tmp_path: Path, tiny_llama: Path) -> None:
    plan, out = written(tmp_path, tiny_llama, seeds=[0, 1, 2], passes=100), tmp_path / "out"
    async with running(plan, out) as process:
        await until(lambda: bool(rows(tmp_path)), within_s=100)
        family = descendants(process.pid)
        process.kill()
        _, error = process.communicate(timeout=20)
        await all_end(family)
    # the standard library's word for a worker that was being started just then
    assert error == "" or error.endswith(("\nEOFError: Ran out of input\n", "\nEOFError\n"))
    done = rows(tmp_path)
    assert 1 <= len(done) < 6
    await goes_on(plan, out, done)


@pytest.mark.timeout(150)
async def test_ctrl_c_ends_all_processes_without_a_traceback(tmp_path: Path, tiny_llama: Path) -> None:
    plan, out = written(tmp_path, tiny_llama), tmp_path / "out"
    async with running(plan, out) as process:
        await until(lambda: len(descendants(process.pid)) >= 3, within_s=45)  # two servers of processes, and a worker
        family = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        shown, error = process.communicate(timeout=20)
        await all_end(family)
    assert (process.returncode, error) == (128 + signal.SIGINT, "")
    assert "Interrupted" in shown


async def goes_on(plan: Path, out: Path, done: list[dict[str, Any]]) -> None:
    async with running(plan, out) as second:
        _, error = second.communicate(timeout=100)
    assert (second.returncode, error) == (0, "")
    found = rows(plan.parent)
    assert found[: len(done)] == done
    assert len({row["key"] for row in found}) == len(found) == 6


def test_the_command_says_what_is_wrong(tmp_path: Path, tiny_llama: Path, meerkat: Meerkat) -> None:
    plan = written(tmp_path, tiny_llama, local_steps=[50])
    meerkat("sweep", plan, "--out", tmp_path / "out").failed(2, "plan.toml: passes: 8 do not hold one round")
    assert not (tmp_path / "out").exists()
