"""Two processes with one id: a cloned card."""

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest

from meerkat_mq.config import RoundsConfig, ServerConfig
from meerkat_mq.server import serve
from meerkat_mq.server.ledger import MemoryLedger
from tests.server.federation import PACE, PATIENCE_S, Federation
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(150)

BOUND_S = 10.0
CLIENT = "as meerkat-f-node-0 "


async def test_of_two_nodes_with_one_id_the_older_ends_in_words(
    federation: Federation, mosquitto: Mosquitto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = MemoryLedger()
    monkeypatch.setattr("meerkat_mq.server.service.MemoryLedger", lambda: ledger)
    await federation.ghost()
    rounds = RoundsConfig.model_validate(PACE | {"min_nodes": 2})
    config = ServerConfig(
        federation="f", state_dir=tmp_path / "s", engine="toy", broker=mosquitto.config, rounds=rounds
    )
    server = asyncio.create_task(serve(config))
    card = federation.node("node-0")
    await until(lambda: len(ledger.updates) > 5, within_s=PATIENCE_S)
    before = mosquitto.log.count(CLIENT)

    clone = federation.node("node-0", name="clone")
    await clone.says("connected")
    whose = f"another process with this id runs on host {socket.gethostname()}"
    await card.failed(6, "up/node-0/status", whose, within_s=BOUND_S)
    done = len(ledger.updates)
    await until(lambda: len(ledger.updates) > done + 5 or clone.over, within_s=PATIENCE_S)
    assert not clone.over
    assert len({record.boot for record in ledger.updates}) == 2
    assert 1 <= mosquitto.log.count(CLIENT) - before <= 5

    identities = [(record.version, record.node) for record in ledger.updates]
    assert len(identities) == len(set(identities))
    server.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await server


async def test_a_state_folder_is_used_by_one_process(federation: Federation) -> None:
    await federation.node("node-0").says("waiting for a server")
    other = federation.node("node-1", state_dir="node-0")
    await other.failed(2, "node-1.toml: state_dir", "is in use by another node process")
