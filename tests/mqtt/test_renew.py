"""A session makes another connection because its will has changed."""

import pytest

from meerkat_mq.mqtt import Message, Will
from tests.support.mosquitto import Mosquitto
from tests.support.peer import peer
from tests.support.waiting import until


async def test_a_renewed_connection_has_the_will_as_it_is_by_then(mosquitto: Mosquitto) -> None:
    last_words = b"old"

    def fail(message: Message) -> None:
        if message.topic == "end":
            raise ArithmeticError

    async with peer(mosquitto.config, "watcher", [("s", 1)]) as watcher:
        will = lambda link: Will("s", last_words)  # noqa: E731
        async with peer(mosquitto.config, "a", [("end", 1)], react=fail, will=will) as a:
            last_words = b"new"
            a.session.publish("s", b"before", qos=1)
            a.session.renew()
            a.session.renew()
            await a.connected(times=2)
            assert a.reasons == ["renewed"]
            a.session.publish("s", b"after")
            await until(lambda: b"after" in watcher.payloads)
            await watcher.session.publish("end", b"")
            with pytest.raises(ArithmeticError):
                await a.task
        await until(lambda: b"new" in watcher.payloads)
    assert b"old" not in watcher.payloads
    assert watcher.payloads[-1] == b"new"
    assert b"before" in watcher.payloads
    assert len(a.links) == 2
