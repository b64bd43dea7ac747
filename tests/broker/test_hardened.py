"""`broker/mosquitto-tls.conf` (and NATS's) with what `meerkat certs` makes: who may write and read what."""

import pytest

from meerkat_mq.errors import BrokerError
from meerkat_mq.mqtt import Message, Will
from tests.broker.guarded import NODES, Guarded, node, without_rabbitmq
from tests.server.federation import TOPICS, Federation, all_end
from tests.support.peer import Peer, peer
from tests.support.waiting import until

silent = pytest.mark.not_on(
    nats="refuses aloud what Mosquitto drops; test_nats_acknowledges_nothing_that_is_not_allowed"
)
FOREIGN = [
    TOPICS.server,
    TOPICS.run,
    TOPICS.round,
    TOPICS.values,
    TOPICS.blob(bytes(16), 0),
    TOPICS.up("node-1", "update"),
    TOPICS.up("node-1", "status"),
    TOPICS.up("node-1", "want"),
    TOPICS.reply("node-0"),
    TOPICS.reply("node-1"),
    f"{TOPICS.root}/up/node-0",
    f"{TOPICS.root}/up/node-0/other",
    f"{TOPICS.root}/up/node-0/status/other",
    "meerkat/v1/another/up/node-0/update",
    "anything",
]


def fail(message: Message) -> None:
    raise ArithmeticError


async def test_a_federation_finishes_over_it(federation: Federation, guarded: Guarded) -> None:
    nodes = [federation.node(name, exit_when_finished=True, broker=guarded.table(f"nodes/{name}")) for name in NODES]
    server = federation.server("--once", rounds={"count": 5, "min_nodes": 2}, broker=guarded.table("server"))
    assert await all_end(server, *nodes) == [0, 0, 0]
    digests = {service.said("finished")[0]["digest"] for service in nodes}
    assert digests == {server.said("run finished")[0]["digest"]}
    assert [len(server.said("round closed", heard=2)), len(federation.eye.states) > 0] == [5, True]


@without_rabbitmq
@silent
@pytest.mark.parametrize("topic", FOREIGN)
async def test_a_node_writes_nowhere_but_on_its_own_three_topics(guarded: Guarded, topic: str) -> None:
    own = TOPICS.up("node-0", "update")
    async with peer(guarded.way("observer"), "eye", [(f"{TOPICS.root}/#", 1)]) as eye, node(guarded, 0) as a:
        for retain in (False, True):
            a.session.publish(topic, b"forged", retain=retain)
        a.session.publish(own, b"mine")
        await until(lambda: eye.messages)
        assert [(message.topic, message.payload) for message in eye.messages] == [(own, b"mine")]
    filters = [(f"{TOPICS.root}/#", 1)]
    async with peer(guarded.way("observer"), "late", filters) as late, node(guarded, 1) as b:  # nor was it kept
        await b.session.publish(TOPICS.up("node-1", "update"), b"end")
        await until(lambda: late.messages)
        assert late.payloads == [b"end"]


@without_rabbitmq
@pytest.mark.not_on(mosquitto="drops in silence what NATS refuses aloud; the tests above")
async def test_nats_acknowledges_nothing_that_is_not_allowed(guarded: Guarded) -> None:
    own = TOPICS.up("node-0", "update")
    async with peer(guarded.way("observer"), "eye", [(f"{TOPICS.root}/#", 1)]) as eye:
        async with node(guarded, 0) as thief:
            for topic in FOREIGN:
                thief.session.publish(topic, b"forged", retain=True)
            await until(lambda: guarded.broker.log.count("Publish Violation") == len(FOREIGN))
        async with node(guarded, 0) as a:
            await a.session.publish(own, b"mine")
            await until(lambda: eye.messages)
        assert [(message.topic, message.payload) for message in eye.messages] == [(own, b"mine")]
    for topic in (TOPICS.reply("node-1"), TOPICS.up("node-1", "update"), f"{TOPICS.root}/#", "#"):
        with pytest.raises(BrokerError, match="refuses the subscription"):
            await Peer(guarded.way("nodes/node-0"), "a", [(topic, 1)]).task


@without_rabbitmq
@silent
async def test_a_node_reads_what_is_common_and_its_own_alone(guarded: Guarded) -> None:
    common = [TOPICS.server, TOPICS.run, TOPICS.round, TOPICS.values, TOPICS.blob(bytes(16), 0)]
    own = [TOPICS.reply("node-0"), TOPICS.up("node-0", "status")]
    others = [TOPICS.reply("node-1"), TOPICS.up("node-1", "status"), TOPICS.up("node-1", "update"), "$SYS/x", "x"]
    async with peer(guarded.way("server"), "server") as server:
        for topic in (*others, *common, *own):
            await server.session.publish(topic, b"kept", retain=True)
        async with node(guarded, 0, "#", "+/v1/#", "$SYS/#", *others, *common, *own) as a:
            for topic in (*others, *common, *own):
                server.session.publish(topic, b"live")
            await until(lambda: [message.topic for message in a.messages if message.payload == b"live"][-2:] == own)
            assert {message.topic for message in a.messages} == {*common, *own}


@without_rabbitmq
@silent
async def test_a_will_for_another_is_never_published(guarded: Guarded) -> None:
    """Mosquitto takes it with CONNECT, and asks the ACL when it is due."""
    status = TOPICS.up("node-1", "status")

    async def die(number: int, words: bytes) -> None:
        own = TOPICS.up(f"node-{number}", "status")
        way = guarded.way(f"nodes/node-{number}")
        dying = Peer(way, f"client-{number}", [(own, 1)], react=fail, will=lambda link: Will(status, words))
        await dying.connected()
        dying.session.publish(own, b"")
        with pytest.raises(ArithmeticError):
            await dying.task

    async with peer(guarded.way("observer"), "eye", [(status, 1)]) as eye:
        await die(0, b"forged")
        await die(1, b"true")
        await until(lambda: b"true" in eye.payloads)
        assert eye.payloads == [b"", b"true"]
