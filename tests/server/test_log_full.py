"""Services whose standard error is full, closed, or a pipe that nobody reads: they lose log lines, and nothing else."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest
import tomli_w

from meerkat_mq.ledger.sqlite import Ledger
from tests.server.federation import NAME, Federation
from tests.support.broker import Broker
from tests.support.waiting import until

ROUNDS = {"count": 30, "lr": 0.05, "batch_size": 4, "min_updates": 1}


@contextmanager
def full() -> Iterator[int]:
    with Path("/dev/full").open("wb", buffering=0) as device:
        yield device.fileno()


@contextmanager
def without_a_reader() -> Iterator[int]:
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@contextmanager
def never_read() -> Iterator[int]:
    """A full pipe whose reader stands still."""
    reading, writing = os.pipe()
    size = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writing, bytes(size))
    yield writing
    os.close(writing)
    os.close(reading)


def started(command: Sequence[str], stderr: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stderr=stderr)


def shell(line: str) -> tuple[int, bytes]:
    done = subprocess.run(["sh", "-c", line], capture_output=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("stderr", [full, without_a_reader, never_read, None], ids=["full", "left", "stuck", "closed"])
async def test_a_federation_whose_logs_go_nowhere_finishes(
    tmp_path: Path, mosquitto: Broker, stderr: Callable[[], AbstractContextManager[int]] | None
) -> None:
    own: dict[str, object] = {"federation": NAME, "broker": {"url": mosquitto.config.url}}
    server = own | {"state_dir": "server", "engine": "toy", "toy_weights": 20, "rounds": ROUNDS}
    node = own | {"id": "a", "state_dir": "a", "data": "rows.jsonl"}
    (tmp_path / "rows.jsonl").write_text('{"seed": 7}\n')
    with ExitStack() as stack:
        to = subprocess.DEVNULL if stderr is None else stack.enter_context(stderr())
        running = []
        for name, table in {"server": server, "node": node}.items():
            (tmp_path / f"{name}.toml").write_text(tomli_w.dumps(table))
            command = [
                sys.executable,
                "-m",
                f"meerkat_mq.{name}",
                "--config",
                str(tmp_path / f"{name}.toml"),
                "--json-logs",
            ]
            process = started(command if stderr else ["sh", "-c", f"exec {' '.join(command)} 2>&-"], to)
            stack.callback(process.wait)
            stack.callback(process.kill)
            running.append(process)
        await until((tmp_path / "server" / "difference.mkd").exists, within_s=40)
        for process in running:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(10) for process in running] == [0, 0]
    ledger = Ledger.read(tmp_path / "server" / "ledger.sqlite")
    assert ledger.version == ROUNDS["count"]
    ledger.close()


async def test_the_lines_of_a_command_may_find_their_reader_gone(federation: Federation) -> None:
    server, node = federation.server("--once", rounds=ROUNDS), federation.node("a", exit_when_finished=True)
    assert [await server.ended(), await node.ended()] == [0, 0]
    line = f"{sys.executable} -m meerkat_mq ledger {federation.folder / 'server'} --json"
    _, said = shell(f"({line}; echo $? >&2) | true")
    assert said in (b"141\n", b"0\n")  # 0: it had said all before the reader left
    code, said = shell(f"{line} >/dev/full")
    assert (code, said.count(b"\n")) == (2, 1)
