"""`meerkat simulate` as a process: what it says where nobody looks, and how Ctrl-C ends it."""

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.waiting import until


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """A shell starts what it puts in the background deaf to Ctrl-C, and so were all that we start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


async def start(schedules: int) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "meerkat_mq", "simulate", "--schedules", str(schedules)]
    return await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, start_new_session=True)


def children(process: int) -> int:
    """How many processes it started that still run."""
    return len(Path(f"/proc/{process}/task/{process}/children").read_text().split())


async def test_nothing_is_on_a_piped_stderr() -> None:
    process = await start(1)
    out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert out.startswith(b"1 schedules, ")


async def test_ctrl_c_ends_it_at_once_and_quietly() -> None:
    started = time.monotonic()
    process = await start(1_000_000)
    await until(lambda: children(process.pid) > (os.cpu_count() or 1), within_s=30)  # one more tracks resources
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, err = await asyncio.wait_for(process.communicate(), 20)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, err) == (130, b"")
    assert time.monotonic() - began < 5 * (began - started)  # a busy machine is slow in both
