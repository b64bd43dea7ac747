"""What one certificate can cost a Mosquitto with `broker/mosquitto-tls.conf`."""

import asyncio
import contextlib

import pytest

from tests.broker.guarded import NODES, STOLEN, Guarded, Raw, node, own_words, publish, without_rabbitmq
from tests.server.federation import PACE, TOPICS, Federation
from tests.support.peer import peer
from tests.support.waiting import until

pytestmark = [without_rabbitmq, own_words]


async def test_what_a_certificate_can_leave_on_the_broker_has_a_bound(federation: Federation, guarded: Guarded) -> None:
    """Attack: fill the broker with retained messages of the largest size, everywhere below its own up/."""
    nodes = [federation.node(name, broker=guarded.table(f"nodes/{name}")) for name in NODES]
    server = federation.server(rounds=PACE | {"min_nodes": 2}, broker=guarded.table("server"))
    await server.says("round closed", heard=2)
    before_mib = guarded.memory_mib()
    root, chunk, eye = f"{TOPICS.root}/up/{STOLEN}", bytes(130_000), federation.eye
    eye.noise |= {chunk, b"end"}
    for attempt in range(3):
        _, writer = await guarded.deaf(f"nodes/{STOLEN}", f"{root}/status")
        with contextlib.suppress(ConnectionError):  # Mosquitto 2.0 closes the connection of who writes where it may not
            for number in range(100):
                writer.write(publish(f"{root}/{attempt}/{number}", chunk, retain=True))
                await asyncio.wait_for(writer.drain(), 20)
        writer.transport.abort()
    async with node(guarded, 2) as stolen:
        for kind in ("status", "update", "want"):
            await stolen.session.publish(f"{root}/{kind}", chunk, retain=True)
    assert guarded.memory_mib() - before_mib < 10
    eye.session.subscribe(f"{root}/#")
    async with node(guarded, 2) as stolen:
        await until(lambda: any(message.retained and message.payload == chunk for message in eye.messages))
        await stolen.session.publish(f"{root}/update", b"end")
        await until(lambda: b"end" in eye.payloads)
    kept = {message.topic for message in eye.messages if message.payload == chunk}
    assert kept == {f"{root}/{kind}" for kind in ("status", "update", "want")}
    await server.says("round closed", times=len(server.said("round closed")) + 3, heard=2)
    assert not any(service.said("connection lost") for service in (server, *nodes))


async def test_what_waits_for_a_session_has_a_bound(guarded: Guarded) -> None:
    """Attack: a reader that does not read, and writes to itself."""
    guarded.replace("max_queued_bytes 67108864", "max_queued_bytes 4194304")
    status = TOPICS.up(STOLEN, "status")
    _, writer = await guarded.deaf(f"nodes/{STOLEN}", status)
    before_mib = guarded.memory_mib()
    try:
        for number in range(1, 301):
            writer.write(publish(status, bytes(130_000), number))
            await asyncio.wait_for(writer.drain(), 20)
        async with peer(guarded.way("observer"), "eye", [(status, 1)]) as eye, node(guarded, 1) as b:
            await b.session.publish(TOPICS.up("node-1", "want"), b"")
            assert eye.up
        assert guarded.memory_mib() - before_mib < 24  # in flight, and waiting; 39 were written
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("size", [10, 140_000])
async def test_what_the_protocol_does_not_use_ends_the_connection(guarded: Guarded, size: int) -> None:
    """QoS 2, whose handshakes a broker keeps, and packets over the limit."""
    way = guarded.way("nodes/node-0").model_copy(update={"max_packet_bytes": 2**20})
    async with peer(way, "a") as a:
        a.session.publish(TOPICS.up("node-0", "update"), bytes(size), qos=2 if size == 10 else 1)
        await until(lambda: a.reasons)


async def test_what_waits_for_a_session_that_was_left_behind_has_a_bound(guarded: Guarded) -> None:
    """Attack: subscribe with a session that outlives its connection, and leave; under other client ids, again."""
    guarded.replace("max_queued_bytes 67108864", "max_queued_bytes 4194304")
    status = TOPICS.up(STOLEN, "status")
    for client in ("x", "y", "z"):
        left = await Raw.connected(guarded, f"nodes/{STOLEN}", client, clean=False)
        assert await left.subscribed(status)
        left.drop()
    before_mib = guarded.memory_mib()
    async with peer(guarded.way("server"), "server") as server:
        for _ in range(300):
            await server.session.publish(status, bytes(130_000))
        assert server.reasons == []
    assert guarded.memory_mib() - before_mib < 24  # of one session: all have the certificate's name; 39 were written
