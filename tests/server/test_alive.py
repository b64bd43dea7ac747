"""Whether a server runs is read off a lock on its folder: without a broker, and never wrong."""

import fcntl
import os
import socket
from pathlib import Path

import pytest

from meerkat_mq.server.alive import alive, is_alive
from meerkat_mq.server.inspect import run_shown
from tests.server.federation import Federation

HERE = socket.gethostname()


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


async def test_a_killed_server_is_not_running(federation: Federation) -> None:
    server = federation.server(rounds={"count": 5})
    await server.says("in charge")
    with federation.ledger() as ledger:
        assert run_shown(ledger).running is True
    server.kill()
    with federation.ledger() as ledger:
        assert run_shown(ledger).running is False
