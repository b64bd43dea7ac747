"""The count of bytes agrees with the wire."""

import pytest

from meerkat_mq.wire.limits import packet_bytes
from tests.support.peer import peer
from tests.support.proxy import PUBLISH, Proxy
from tests.support.waiting import until


@pytest.mark.parametrize("size", [0, 56, 117, 118, 16_000, 16_374, 16_375, 60_000])
@pytest.mark.parametrize("qos", [0, 1])
async def test_packet_bytes_are_what_goes_over_the_wire(proxy: Proxy, size: int, qos: int) -> None:
    async with peer(proxy.config, "sender", kind_of=lambda topic: topic.rsplit("/", 1)[-1]) as sender:
        sender.session.publish("topic/ü/x", bytes(size), qos=qos)
        await until(lambda: proxy.count(PUBLISH, up=True))
        (sent,) = [packet.data for packet in proxy.packets if packet.kind == PUBLISH]
        assert packet_bytes("topic/ü/x", bytes(size), qos) == len(sent)
        count = sender.session.sent["x"]
        assert (count.messages, count.payload_bytes, count.packet_bytes) == (1, size, len(sent))


def test_an_update_of_one_step_is_within_its_budget() -> None:
    assert packet_bytes("m" * 30, bytes(56), 1) <= 100
