"""Two processes with one id: a cloned card."""

import socket
from contextlib import closing

import pytest

from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from tests.server.federation import PACE, Federation

pytestmark = pytest.mark.timeout(150)

BOUND_S = 10.0


async def test_of_two_nodes_with_one_id_the_older_ends_in_words(federation: Federation) -> None:
    await federation.ghost()
    server = federation.server(rounds=PACE | {"min_nodes": 2})
    card = federation.node("node-0")
    await server.says("round closed", times=5)
    clone = federation.node("node-0", name="clone")
    await clone.says("connected")
    whose = f"another process with this id runs on host {socket.gethostname()}"
    await card.failed(6, "up/node-0/status", whose, within_s=BOUND_S)
    done = len(server.said("round closed"))
    await server.says("round closed", times=done + 5)
    assert not clone.over
    assert len(card.said("connected")) + len(clone.said("connected")) <= 6

    with closing(Ledger.read(federation.folder / "server" / LEDGER_FILE)) as ledger:
        heard = [ledger.records(version) for version in range(ledger.version)]
    assert len(heard) >= done + 5
    assert [len(records) for records in heard] == [1] * len(heard)
    assert len({records[0].boot for records in heard}) == 2


async def test_a_state_folder_is_used_by_one_process(federation: Federation) -> None:
    await federation.node("node-0").says("waiting for a server")
    other = federation.node("node-1", state_dir="node-0")
    await other.failed(2, "node-1.toml: state_dir", "is in use by another node process")
