"""What repeats at the rate of messages is said less and less often, by server and node (with a count of the rest)."""

import asyncio

import pytest

from tests.server.federation import PACE, TOPICS, Federation

pytestmark = pytest.mark.timeout(150)
MANY = 500


async def test_junk_costs_lines_by_topic_and_reason_not_by_message(federation: Federation) -> None:
    node, server = federation.node("node-0"), federation.server(rounds=PACE)
    await server.says("round closed")
    publish = federation.eye.session.publish
    for number in range(MANY):
        publish(TOPICS.up("evil", "update"), b"%d" % number)
        publish(TOPICS.reply("node-0"), b"%d" % number)
    await federation.eye.session.drain(60)
    for service, topic in ((server, TOPICS.up("evil", "update")), (node, TOPICS.reply("node-0"))):
        await service.says("message dropped", topic=topic)
        while not any("left_out" in line for line in service.said("message dropped", topic=topic)):
            publish(topic, b"more")
            await asyncio.sleep(0.1)
        assert len(service.said("message dropped", topic=topic)) <= 15


async def test_an_update_over_the_nodes_packet_limit_ends_nobody(federation: Federation) -> None:
    node = federation.node("node-0", broker={"max_packet_bytes": 1024})
    server = federation.server(rounds=PACE | {"local_steps": 500, "batch_size": 1}, toy_weights=10)
    line = await node.says("not sent", frame="Update")
    assert "over the limit of 1024" in line["problem"]
    assert "broker.max_packet_bytes" in line["problem"]
    await server.says("round extended", times=2)
    assert not node.over
    assert len(node.said("not sent")) <= 10
