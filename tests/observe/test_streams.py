"""Diagnostics that cannot be written are dropped and counted; answers that cannot be given end a command in words."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
import structlog

from meerkat_mq.errors import ConfigError
from meerkat_mq.observe.logs import configure_logs
from meerkat_mq.observe.streams import Diagnostics

MEERKAT = [sys.executable, "-m", "meerkat_mq"]


class Disk:
    """A file on a disk that is full at times: it takes so many bytes more."""

    def __init__(self, file: IO[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: float = float("inf")
        self._write = os.write
        self._descriptor = file.fileno()
        monkeypatch.setattr(os, "write", self)

    def __call__(self, descriptor: int, data: Any) -> int:
        if descriptor != self._descriptor:
            return self._write(descriptor, data)
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(descriptor, bytes(data)[: int(min(self.room, len(data)))])
        self.room -= written
        return written


def test_lines_that_cannot_be_written_are_counted_and_the_count_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "log").open("w+b") as file:
        disk, stream = Disk(file, monkeypatch), Diagnostics(file)
        stream.write(b"one\n")
        disk.room = 2
        stream.write(b"torn\n")
        stream.write(b"two\nlines\n")
        disk.room = float("inf")
        stream.write(b"again\n")
        stream.write(b"on\n")
    assert (tmp_path / "log").read_text() == "one\nto\nmeerkat: 3 lines dropped\nagain\non\n"


def test_the_log_says_how_many_of_its_lines_were_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "log").open("w") as text:
        configure_logs(as_json=True, file=text)
        disk = Disk(text, monkeypatch)
        log = structlog.get_logger()
        disk.room = 0
        for number in range(5):
            log.info("lost", number=number)
        disk.room = float("inf")
        log.info("kept")
    said, kept = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert (said["event"], said["lines"], said["level"]) == ("log lines dropped", 5, "warning")
    assert kept["event"] == "kept"


def test_a_log_whose_file_is_closed_costs_nothing_else(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as text:
        configure_logs(as_json=True, file=text)
        descriptor = text.fileno()
    other = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)  # what has the number now gets no log line
    assert other == descriptor
    structlog.get_logger().warning("late")
    os.close(other)
    assert (tmp_path / "other").read_bytes() == (tmp_path / "log").read_bytes() == b""


def test_a_reader_that_stands_still_is_not_waited_for() -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb") as writer:
        stream = Diagnostics(writer)
        for _ in range(100):
            stream.write(bytes(1000) + b"\n")
        assert stream.dropped >= 95
        os.read(reader.fileno(), 4096)
        stream.write(b"again\n")
        assert stream.dropped == 0


@pytest.mark.parametrize(
    ("redirected", "words"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")]
)
@pytest.mark.parametrize("command", ["--help", "--version", "mask --help"])
def test_an_answer_that_cannot_be_given_is_one_line(command: str, redirected: str, words: str) -> None:
    line = f"{sys.executable} -m meerkat_mq {command} {redirected}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    said = f"meerkat: standard output: cannot be written ({words}); free space there, or send it elsewhere\n"
    assert (done.returncode, done.stdout, done.stderr) == (ConfigError.exit_code, "", said)


def test_a_reader_that_has_enough_ends_a_command_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*MEERKAT, "--help"], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


PRINTING = """
import asyncio, sys
from meerkat_mq.observe.start import start
start()
from meerkat_mq.observe.process import run_process, run_task

async def main():
    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(2):
                tasks.create_task(say())
    finally:
        await asyncio.sleep(0)
        print("in order", file=sys.stderr)

async def say():
    while True:
        print("more", flush=True)
        await asyncio.sleep(0.01)

run_process(lambda: run_task(main))
"""


def test_a_reader_that_left_ends_what_runs_on_a_loop_in_order() -> None:
    process = subprocess.Popen([sys.executable, "-c", PRINTING], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"more\n"
    process.stdout.close()
    assert (process.wait(20), process.stderr.read()) == (141, b"in order\n")
    process.stderr.close()


@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-", "<&- >&- 2>&-"])
def test_an_error_that_cannot_be_said_keeps_its_code(redirected: str) -> None:
    line = f"{sys.executable} -m meerkat_mq node --config none.toml {redirected}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (ConfigError.exit_code, b"", b"")
