"""A node whose outbox is full: what it cannot send is dropped, and it goes on."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.errors import NotConnected
from meerkat_mq.mqtt import Session
from meerkat_mq.mqtt.outbox import Outbox, Outgoing
from meerkat_mq.node import service
from meerkat_mq.wire.messages import Want
from tests.node.mini_server import MiniServer, node
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import until

WEIGHTS = 40_000  # three chunks, in float32


async def test_chunks_for_which_there_is_no_room_are_dropped(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(service, "Session", partial(Session, outbox_bytes=100_000))  # one chunk
    uplink: dict[str, Any] = {"uplink": "values", "values": {"codec": "float32", "optimiser": "sgd", "lr": 0.5}}
    async with (
        MiniServer(mosquitto.config, weights=WEIGHTS, values=True) as server,
        node(tmp_path, mosquitto.config, **uplink),
    ):
        server.announce()
        update = await server.update()
        assert update.values is not None
        for index in range(3):
            while "not sent" not in capsys.readouterr().out:  # which is said less and less often
                server.say(Want(server.header, update.boot, blob=update.values.blob, chunks=(index, 0, 1, 2)))
                await asyncio.sleep(0.1)
        await until(lambda: len(server.chunks) >= 3)
        server.close()
        server.announce()
        await server.update_from(1)


async def test_an_update_for_which_there_is_no_room_goes_out_later(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put, full = Outbox.put, [True]

    def refuse(outbox: Outbox, out: Outgoing) -> None:
        if full and out.topic.endswith("/update"):
            raise NotConnected(out.topic, "full")
        put(outbox, out)

    monkeypatch.setattr(Outbox, "put", refuse)
    async with MiniServer(mosquitto.config) as server, node(tmp_path, mosquitto.config):
        server.announce()
        await until(lambda: "not sent" in capsys.readouterr().out)
        full.clear()
        server.announce()
        assert (await server.update()).header.version == 0
