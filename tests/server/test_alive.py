"""Whether a server runs is read off a lock on its folder: without a broker, and never wrong."""

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from meerkat_mq.server.alive import alive, is_alive
from meerkat_mq.server.commands import run_now
from tests.server.federation import Federation

HERE = socket.gethostname()
HOLD = (
    "import sys, pathlib; from meerkat_mq.server.alive import alive\nwith alive(pathlib.Path(sys.argv[1])) as alone:\n"
    "    print(alone, flush=True); sys.stdin.read()"
)


def test_seen_while_it_lasts_by_any_number_of_askers(tmp_path: Path) -> None:
    assert is_alive(tmp_path, HERE) is False
    with alive(tmp_path):
        with alive(tmp_path):  # a second one, with --replace
            assert [is_alive(tmp_path, HERE) for _ in range(3)] == [True] * 3
        assert is_alive(tmp_path, HERE) is True
    assert is_alive(tmp_path, HERE) is False
    assert list(tmp_path.iterdir()) == []


def test_a_server_elsewhere_is_not_known_to_have_ended(tmp_path: Path) -> None:
    assert is_alive(tmp_path, "another-host") is None
    with alive(tmp_path):  # in a container of another name, say
        assert is_alive(tmp_path, "another-host") is True
    assert is_alive(tmp_path / "none", HERE) is None


def test_where_there_are_no_locks_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(37, os.strerror(37))  # ENOLCK

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with alive(tmp_path):
        assert is_alive(tmp_path, HERE) is None
    monkeypatch.undo()
    monkeypatch.delattr(fcntl, "F_OFD_GETLK")
    assert is_alive(tmp_path, HERE) is None


def test_each_process_sees_the_others_and_a_killed_one_is_none(tmp_path: Path) -> None:
    def start() -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    first, alone = start()
    assert alone == "True"
    with alive(tmp_path) as too:
        assert not too
        first.communicate()
        second, alone = start()
        assert alone == "False"
    second.kill()
    second.communicate()
    with alive(tmp_path) as alone_again:
        assert alone_again


def test_where_nothing_can_be_locked_nothing_is_held_against_it(tmp_path: Path) -> None:
    with alive(tmp_path / "no-such-folder") as alone:
        assert alone


async def test_a_killed_server_is_not_running(federation: Federation) -> None:
    server = federation.server(rounds={"count": 5})
    await server.says("in charge")
    with federation.ledger() as ledger:
        assert run_now(ledger).running is True
    server.kill()
    with federation.ledger() as ledger:
        assert run_now(ledger).running is False
