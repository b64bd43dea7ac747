"""A node that is behind and has no broker."""

from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.mqtt import Session
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds import node as machine
from meerkat_mq.wire.frames import Frame
from tests.node.mini_server import MiniServer, node
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import until


async def test_what_it_asks_for_meanwhile_does_not_pile_up(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "RETRY_S", 0.05)
    asked: list[e.NodeEffect] = []
    offline: list[str] = []
    handle, publish = machine.NodeMachine.handle, Session.publish

    def counting(self: machine.NodeMachine, event: e.NodeEvent) -> list[e.NodeEffect]:
        effects = handle(self, event)
        asked.extend(effect for effect in effects if isinstance(effect, e.Send))
        return effects

    def watched(self: Session, topic: str, payload: bytes, **options: Any) -> Any:
        if self.link is None:
            offline.append(topic.rpartition("/")[2])
        return publish(self, topic, payload, **options)

    def silent(frame: Frame) -> None:
        pass

    monkeypatch.setattr(machine.NodeMachine, "handle", counting)
    async with MiniServer(mosquitto.config) as server, node(tmp_path, mosquitto.config):
        await server.status("online")
        monkeypatch.setattr(server, "say", silent)
        monkeypatch.setattr(Session, "publish", watched)
        server.close()
        server.close()
        server.announce(known=0, asked=False)
        await until(lambda: asked)
        mosquitto.kill()
        await until(lambda: not server.peer.session.link)
        asked.clear()
        offline.clear()
        await until(lambda: len(asked) >= 5)
        assert "want" not in offline
        monkeypatch.undo()
        mosquitto.start()
        await server.stands_at(2)
