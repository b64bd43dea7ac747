"""The table of attacks in broker/README.md, row by row, against the broker that `--broker` names.

The holder of node-1's certificate attacks; node-0 is honest. Each attack gives whether the broker holds it, and the
table must say the same.
"""

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from meerkat_mq.broker.certs import write_certificates
from meerkat_mq.errors import BadCredentials
from tests.broker.guarded import BROKERS, NODES, Guarded, Raw, node, publish
from tests.server.federation import NAME, TOPICS
from tests.support.broker import HOST
from tests.support.peer import FAST, Peer, peer
from tests.support.waiting import until

VICTIM, ATTACKER = NODES
OWN = TOPICS.up(ATTACKER, "status")
MIB = 2**20
Attack = Callable[[Guarded], Awaitable[bool]]


async def retained(guarded: Guarded, topic: str) -> list[bytes]:
    """What the broker keeps on a topic, asked for together with one on which the attacker leaves something."""
    async with node(guarded, 1) as attacker:
        await attacker.session.publish(OWN, b"mark", retain=True)
    async with peer(guarded.way("observer"), "eye", [(topic, 1), (OWN, 1)]) as eye:
        await until(lambda: b"mark" in eye.payloads)
        return [message.payload for message in eye.messages if message.topic == topic]


async def fills_the_broker(guarded: Guarded) -> bool:
    """H2: retained messages on many topics below its own."""
    topic = f"{TOPICS.root}/up/{ATTACKER}/0"
    raw = await Raw.connected(guarded, f"nodes/{ATTACKER}", "x")
    with suppress(OSError):
        for number in range(20):
            raw.send(publish(topic[:-1] + str(number), bytes(100_000), number + 1, retain=True))
        await raw.lives()
    raw.drop()
    return await retained(guarded, topic) == []


async def sends_more_than_a_packet_may_hold(guarded: Guarded) -> bool:
    """H2: a message of a megabyte on a topic that is its own."""
    topic = TOPICS.up(ATTACKER, "want")
    raw = await Raw.connected(guarded, f"nodes/{ATTACKER}", "x")
    with suppress(OSError):
        raw.send(publish(topic, bytes(MIB), 1, retain=True))
        await raw.lives()
    raw.drop()
    return await retained(guarded, topic) == []


async def does_not_read_what_it_subscribed_to(guarded: Guarded) -> bool:
    """H2: a reader that stands still while messages for it come; its broker holds no more than 128 MiB of them."""
    _, writer = await guarded.deaf(f"nodes/{ATTACKER}", OWN)
    before_mib = guarded.memory_mib()
    async with peer(guarded.way("server"), "server") as server:
        for _ in range(24):
            for _ in range(80):
                server.session.publish(OWN, bytes(130_000))
            await server.session.drain(60)
        grown_mib = guarded.memory_mib() - before_mib
    writer.transport.abort()
    return grown_mib < 128


async def subscribes_to_very_many_filters(guarded: Guarded) -> bool:
    """H2: a thousand filters below a topic that it may read."""
    raw = await Raw.connected(guarded, f"nodes/{ATTACKER}", "x")
    root = f"{TOPICS.root}/down/{ATTACKER}"
    taken = [await raw.subscribed(*(f"{root}/{page}/{number}" for number in range(100))) for page in range(10)]
    raw.drop()
    return not all(taken)


async def takes_anothers_client_id(guarded: Guarded) -> bool:
    """H3."""
    async with peer(guarded.way(f"nodes/{VICTIM}"), f"meerkat-{NAME}-{VICTIM}") as victim:
        with suppress(OSError):
            thief = await Raw.connected(guarded, f"nodes/{ATTACKER}", f"meerkat-{NAME}-{VICTIM}")
            await thief.lives()
            thief.drop()
        await victim.session.publish(TOPICS.up(VICTIM, "status"), b"here")
        return victim.reasons == []


async def leaves_a_will_for_another(guarded: Guarded) -> bool:
    """H3: the broker publishes it, in the name of nobody."""
    topic = TOPICS.up(VICTIM, "status")
    async with peer(guarded.way("observer"), "eye", [(topic, 1), (OWN, 1)]) as eye:
        for will in (topic, OWN):
            with suppress(OSError):
                raw = await Raw.connected(guarded, f"nodes/{ATTACKER}", "x", will)
                raw.drop()
                if will == OWN:
                    await until(lambda: any(message.topic == OWN for message in eye.messages))
        return not any(message.topic == topic for message in eye.messages)


async def writes_and_reads_for_another(guarded: Guarded) -> bool:
    """As node-0 to the server; and what the server answers node-0."""
    status, reply = TOPICS.up(VICTIM, "status"), TOPICS.reply(VICTIM)
    async with peer(guarded.way("observer"), "eye", [(status, 1), (OWN, 1)]) as eye:
        with suppress(OSError):
            raw = await Raw.connected(guarded, f"nodes/{ATTACKER}", "x")
            raw.send(publish(status, b"forged", 1))
            await raw.lives()
            raw.drop()
        raw, read = await Raw.connected(guarded, f"nodes/{ATTACKER}", "y"), b""
        taken = await raw.subscribed(reply) and await raw.subscribed(OWN)
        async with peer(guarded.way("server"), "server") as server:
            await server.session.publish(reply, b"secret")
            await server.session.publish(OWN, b"mark")
            await until(lambda: b"mark" in eye.payloads)
            while taken and b"mark" not in read:
                read += await raw.answer(1)
        raw.drop()
        return b"forged" not in eye.payloads and b"secret" not in read


async def comes_back_when_revoked(guarded: Guarded) -> bool:
    """H4: connected, and once more, after what the README says."""
    victim = Peer(guarded.way(f"nodes/{ATTACKER}"), ATTACKER, timeouts=FAST)
    await victim.connected()
    await guarded.revoke(ATTACKER)
    try:
        await until(lambda: victim.reasons)
        with pytest.raises(BadCredentials):
            await Peer(guarded.way(f"nodes/{ATTACKER}"), "again").task
    finally:
        victim.task.cancel()
        await asyncio.gather(victim.task, return_exceptions=True)
    return True


async def holds_an_old_certificate(guarded: Guarded) -> bool:
    """H4: its id has a new certificate, and the old one was revoked."""
    copy = guarded.certificates / "copy"
    (guarded.certificates / "nodes" / ATTACKER).rename(copy)
    if guarded.kind == "mosquitto":
        await guarded.revoke(ATTACKER)
    list(write_certificates(guarded.certificates, nodes=[ATTACKER]))
    async with node(guarded, 1):
        pass
    with suppress(OSError):
        raw = await Raw.connected(guarded, str(copy), "x")
        raw.drop()
        return False
    return True


async def opens_many_connections(guarded: Guarded) -> bool:
    """H5: ten with one certificate; a second one may be a device's that lost its first."""
    opened = []
    for number in range(10):
        with suppress(OSError):
            opened.append(await Raw.connected(guarded, f"nodes/{ATTACKER}", f"x{number}"))
    alive = [await raw.lives() for raw in opened]
    for raw in opened:
        raw.drop()
    return sum(alive) <= 2


async def opens_sockets_and_says_nothing(guarded: Guarded) -> bool:
    """H5: without any certificate; whether all are closed within 12 seconds."""
    sockets = [await asyncio.open_connection(HOST, guarded.port) for _ in range(5)]
    ends = [asyncio.create_task(reader.read()) for reader, _ in sockets]
    _, waiting = await asyncio.wait(ends, timeout=12)
    for _, writer in sockets:
        writer.transport.abort()
    await asyncio.gather(*ends, return_exceptions=True)
    return not waiting


async def asks_for_a_weak_cipher_suite(guarded: Guarded) -> bool:
    """H23: CBC, with a certificate that is good."""
    way = guarded.way(f"nodes/{ATTACKER}")
    tls = ssl.create_default_context(cafile=way.ca_file)
    tls.load_cert_chain(way.cert_file or "", way.key_file)
    tls.maximum_version = ssl.TLSVersion.TLSv1_2
    tls.set_ciphers("ECDHE-ECDSA-AES128-SHA256:ECDHE-ECDSA-AES256-SHA:ECDHE-ECDSA-AES128-SHA")
    try:
        _, writer = await asyncio.open_connection(HOST, guarded.port, ssl=tls)
    except OSError:  # an SSLError is one
        return True
    writer.transport.abort()
    return False


ATTACKS: dict[str, Attack] = {
    "retains messages on many topics below its own": fills_the_broker,
    "sends a message of a megabyte": sends_more_than_a_packet_may_hold,
    "subscribes, and does not read": does_not_read_what_it_subscribed_to,
    "subscribes to a thousand filters": subscribes_to_very_many_filters,
    "connects under another's client id": takes_anothers_client_id,
    "leaves a will for another's topic": leaves_a_will_for_another,
    "writes and reads for another": writes_and_reads_for_another,
    "comes back when revoked": comes_back_when_revoked,
    "uses its old certificate when its id has a new one": holds_an_old_certificate,
    "opens ten connections with one certificate": opens_many_connections,
    "opens sockets and says nothing": opens_sockets_and_says_nothing,
    "asks for a weak cipher suite": asks_for_a_weak_cipher_suite,
}


def table() -> dict[str, dict[str, str]]:
    """What broker/README.md says of each attack and broker."""
    section = (BROKERS / "README.md").read_text(encoding="utf-8").split("\n## Which broker holds which attack\n")[1]
    rows = [
        re.split(r"(?<!\\)\|", line)[1:-1] for line in section.split("\n## ")[0].splitlines() if line.startswith("|")
    ]
    head, _, *rest = [[cell.strip() for cell in row] for row in rows]
    return {row[1]: dict(zip(map(str.lower, head[2:]), row[2:], strict=True)) for row in rest}


def test_the_table_has_every_attack() -> None:
    assert table().keys() == ATTACKS.keys()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("attack", ATTACKS)
async def test_the_table_says_what_the_broker_holds(guarded: Guarded, attack: str) -> None:
    said = table()[attack][guarded.kind]
    assert re.match("held|not held", said)
    assert await ATTACKS[attack](guarded) == said.startswith("held")
