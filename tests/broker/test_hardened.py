"""`broker/mosquitto-tls.conf` (and NATS's) with what `meerkat certs` makes: who may do what."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from meerkat_mq.broker.certs import Authority, revoke_certificates, write_certificates
from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import BadCredentials, BrokerError
from meerkat_mq.mqtt import Message, Will
from tests.server.federation import NAME, PACE, TOPICS, Federation, all_end
from tests.support.broker import HOST, Broker
from tests.support.mosquitto import ShippedMosquitto
from tests.support.nats import Nats
from tests.support.peer import Peer, peer
from tests.support.waiting import until

BROKERS = Path(__file__).parents[2] / "broker"
NODES = ("node-0", "node-1")
STOLEN = "node-2"  # who holds this certificate does what it should not

pytestmark = pytest.mark.not_on(rabbitmq="its rights are users that rabbitmqctl makes (broker/README.md)")
silent = pytest.mark.not_on(
    nats="refuses aloud what Mosquitto drops; test_nats_acknowledges_nothing_that_is_not_allowed"
)
own_words = pytest.mark.not_on(nats="its rights are no ACL file")
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


class Guarded:
    """A broker with a configuration of ours for a network, and the way to it for each user."""

    def __init__(self, folder: Path, *, nats: bool) -> None:
        self.certificates = folder / "certificates"
        *_, last = write_certificates(self.certificates, federation=NAME, hosts=[HOST], nodes=[*NODES, STOLEN])
        assert last.folder.name == STOLEN
        self.broker = self._nats(folder) if nats else self._mosquitto(folder)
        self.port = self.broker.port

    def _mosquitto(self, folder: Path) -> Broker:
        shipped = BROKERS / "mosquitto-tls.conf"
        words = {
            "listener 8883": "listener {port} {host}",
            "/etc/mosquitto/meerkat": str(self.certificates / "broker"),
            "user mosquitto": "user {user}",
        }
        return ShippedMosquitto(folder, shipped, words)

    def _nats(self, folder: Path) -> Broker:
        words = {
            "/etc/nats/meerkat": str(self.certificates / "broker"),
            "v1.field": f"v1.{NAME}",
            "gateway-07": NODES[0],
            "gateway-08": NODES[1],
        }
        return Nats(folder, "nats-tls.conf", "0.0.0.0:8883", **words)

    def way(self, place: str | Path) -> BrokerConfig:
        """With the certificate in this folder."""
        folder = self.certificates / place
        return BrokerConfig(
            url=f"mqtts://{HOST}:{self.port}",
            ca_file=folder / "ca.pem",
            cert_file=folder / "cert.pem",
            key_file=folder / "key.pem",
        )

    def table(self, place: str | Path) -> dict[str, str]:
        """The same for a TOML file."""
        return {key: str(value) for key, value in self.way(place).model_dump(exclude_unset=True).items()}

    def issue(self, place: str, *, days: int, ago: int = 0, hosts: Sequence[str] = ()) -> str:
        """Write a certificate that is valid from some days ago for so many days."""
        authority = Authority.load(self.certificates / "ca")
        now = datetime.now(UTC) - timedelta(days=ago)
        authority.issue(self.certificates / place, Path(place).name, days=days, hosts=hosts, now=now)
        return place

    def memory_mib(self) -> float:
        """What the broker's process holds."""
        status = Path(f"/proc/{self.broker.pid}/status").read_text(encoding="utf-8")
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    async def deaf(self, place: str, topic: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that has subscribed to a topic, and reads no more."""
        way = self.way(place)
        tls = ssl.create_default_context(cafile=way.ca_file)
        tls.load_cert_chain(way.cert_file or "", way.key_file)
        reader, writer = await asyncio.open_connection(HOST, self.port, ssl=tls, limit=1024)
        for head, body in ((0x10, b"\0\4MQTT\4\2\0\x3c\0\1x"), (0x82, b"\0\1" + _text(topic) + b"\1")):
            writer.write(packet(head, body))
            await reader.readexactly(4)
        return reader, writer

    def replace(self, old: str, new: str) -> None:
        """Start again with another line in the configuration."""
        assert isinstance(self.broker, ShippedMosquitto)
        self.broker.kill()
        self.broker.replace(old, new)
        self.broker.start()

    def reload(self) -> None:
        """SIGHUP: certificates and the ACL are read again."""
        os.kill(self.broker.pid, signal.SIGHUP)


@pytest.fixture
def guarded(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Guarded]:
    """Mosquitto, or NATS with --broker nats."""
    guarded = Guarded(tmp_path, nats=request.config.getoption("--broker") == "nats")
    try:
        guarded.broker.start()
        yield guarded
    finally:
        guarded.broker.kill()


@pytest.fixture
async def federation(guarded: Guarded, tmp_path: Path) -> AsyncIterator[Federation]:
    async with Federation(tmp_path, guarded.way("observer")) as running:
        yield running


def publish(topic: str, payload: bytes, number: int = 0, *, retain: bool = False) -> bytes:
    """A PUBLISH packet, of QoS 1 where it has a number."""
    qos, mid = (0b10, number.to_bytes(2, "big")) if number else (0, b"")
    return packet(0x30 | qos | retain, _text(topic) + mid + payload)


def packet(first: int, body: bytes) -> bytes:
    """An MQTT packet."""
    length, rest = b"", len(body)
    while rest > 127:
        length, rest = length + bytes([rest % 128 | 128]), rest // 128
    return bytes([first]) + length + bytes([rest]) + body


def _text(text: str) -> bytes:
    return len(text).to_bytes(2, "big") + text.encode()


def fail(message: Message) -> None:
    raise ArithmeticError


def node(broker: Guarded, number: int, *filters: str) -> AbstractAsyncContextManager[Peer]:
    return peer(broker.way(f"nodes/node-{number}"), f"client-{number}", [(topic, 1) for topic in filters])


async def test_a_federation_finishes_over_it(federation: Federation, guarded: Guarded) -> None:
    nodes = [federation.node(name, exit_when_finished=True, broker=guarded.table(f"nodes/{name}")) for name in NODES]
    server = federation.server("--once", rounds={"count": 5, "min_nodes": 2}, broker=guarded.table("server"))
    assert await all_end(server, *nodes) == [0, 0, 0]
    digests = {service.said("finished")[0]["digest"] for service in nodes}
    assert digests == {server.said("run finished")[0]["digest"]}
    assert [len(server.said("round closed", heard=2)), len(federation.eye.states) > 0] == [5, True]


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


@own_words
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


@own_words
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


@own_words
@pytest.mark.parametrize("size", [10, 140_000])
async def test_what_the_protocol_does_not_use_ends_the_connection(guarded: Guarded, size: int) -> None:
    """QoS 2, whose handshakes a broker keeps, and packets over the limit."""
    way = guarded.way("nodes/node-0").model_copy(update={"max_packet_bytes": 2**20})
    async with peer(way, "a") as a:
        a.session.publish(TOPICS.up("node-0", "update"), bytes(size), qos=2 if size == 10 else 1)
        await until(lambda: a.reasons)


@own_words
async def test_anothers_client_id_is_of_no_use(federation: Federation, guarded: Guarded) -> None:
    """Attack: with a certificate of its own, connect as the server and as each node."""
    nodes = [federation.node(name, broker=guarded.table(f"nodes/{name}")) for name in NODES]
    server = federation.server(rounds=PACE | {"min_nodes": 2}, broker=guarded.table("server"))
    await server.says("round closed", heard=2)
    server_id = (await federation.eye.state("online")).server_id
    own_names = re.findall(r" as (meerkat-\S+|[\w.-]+) \(p2", guarded.broker.log)
    names = {
        "meerkat.server",
        *own_names,
        f"meerkat-{NAME}-server-{server_id}",
        *(f"meerkat-{NAME}-{n}" for n in NODES),
    }
    for name in sorted(names):
        async with peer(guarded.way(f"nodes/{STOLEN}"), name):
            await server.says("round closed", times=len(server.said("round closed")) + 2, heard=2)
    assert not any(service.said("connection lost") for service in (server, *nodes))
    assert federation.eye.reasons == []


@own_words
async def test_a_certificate_is_one_session(guarded: Guarded) -> None:
    async with node(guarded, 0) as first, peer(guarded.way("nodes/node-0"), "anything-else"):
        await until(lambda: first.reasons)


@own_words
async def test_a_second_server_is_refused_and_a_replacing_one_fences_the_first(
    federation: Federation, guarded: Guarded
) -> None:
    """Although, with the first one's certificate, it pushes that off the broker whenever it looks."""
    way, rounds = guarded.table("server"), PACE | {"min_nodes": 2}
    nodes = [federation.node(name, broker=guarded.table(f"nodes/{name}")) for name in NODES]
    first = federation.server(name="first", rounds=rounds, broker=way)
    await first.says("round closed", heard=2, times=3)
    for folder in ("second", "first"):
        second = federation.server(name="second", state_dir=folder, rounds=rounds, broker=way)
        await second.failed(6, f"a server on host {socket.gethostname()} says that it is online", "--replace")
        await first.says("round closed", times=len(first.said("round closed")) + 3, heard=2)
    third = federation.server("--replace", name="third", rounds=rounds, broker=way)
    await first.failed(6, f"a server of term 2 on host {socket.gethostname()} has taken over")
    await third.says("round closed", times=3, heard=2)
    assert not any(service.over for service in nodes)


@own_words
async def test_a_server_that_was_killed_goes_on_at_once(federation: Federation, guarded: Guarded) -> None:
    way, rounds = guarded.table("server"), PACE | {"min_nodes": 2}
    for name in NODES:
        federation.node(name, broker=guarded.table(f"nodes/{name}"))
    first = federation.server(rounds=rounds, broker=way)
    await first.says("round closed", heard=2)
    first.kill()
    again = federation.server(rounds=rounds, broker=way)
    await again.says("round closed", heard=2)
    assert again.said("asking whether the server before this one lives") == []


@own_words
async def test_a_revoked_certificate_is_refused_and_the_federation_goes_on(
    federation: Federation, guarded: Guarded
) -> None:
    """As documented: `meerkat certs revoke`, its list beside the broker's certificate, a restart."""
    for name in (*NODES, STOLEN):
        federation.node(name, broker=guarded.table(f"nodes/{name}"))
    rounds = PACE | {"min_nodes": 2, "deadline_s": 30.0}
    server = federation.server(rounds=rounds, broker=guarded.table("server"))
    await server.says("round closed", heard=3)
    copy = shutil.copytree(guarded.certificates / "nodes" / STOLEN, guarded.certificates / "copy")
    assert revoke_certificates(guarded.certificates, [STOLEN]) == {STOLEN: 1}
    guarded.broker.stop()
    await until(lambda: federation.eye.reasons)  # it has read all that the broker said before it stopped
    before = len(federation.eye.messages)
    guarded.broker.start()
    await server.says("round closed", heard=2, times=len(server.said("round closed", heard=2)) + 5)
    with pytest.raises(BadCredentials, match="refuses the client certificate"):
        await Peer(guarded.way(copy), STOLEN).task
    senders = {parsed[0] for message in federation.eye.messages[before:] if (parsed := TOPICS.parse_up(message.topic))}
    assert senders == set(NODES)

    list(write_certificates(guarded.certificates, nodes=[STOLEN], renew=True))
    async with node(guarded, 2):
        pass  # its new certificate is good, without a word to the broker
    with pytest.raises(BadCredentials, match="refuses the client certificate"):
        await Peer(guarded.way(copy), STOLEN).task


async def test_nobody_comes_in_without_a_certificate(federation: Federation, guarded: Guarded) -> None:
    table = {key: value for key, value in guarded.table("nodes/node-0").items() if key in ("url", "ca_file")}
    await federation.node("node-0", broker=table).failed(
        5, f"{HOST}:{guarded.port}: refuses", "certificate", "broker.cert_file"
    )


async def test_a_certificate_of_another_ca_is_refused(guarded: Guarded, tmp_path: Path) -> None:
    list(write_certificates(tmp_path / "other", nodes=["node-0"]))
    own = guarded.way("nodes/node-0")
    stranger = guarded.way(tmp_path / "other/nodes/node-0").model_copy(update={"ca_file": own.ca_file})
    with pytest.raises(BadCredentials, match=r"refuses the client certificate.*broker\.cert_file"):
        await Peer(stranger, "a").task


@pytest.mark.not_on(nats="calls every bad certificate just that, and the remedy names the ways to be bad")
async def test_an_expired_certificate_ends_a_node_in_words(federation: Federation, guarded: Guarded) -> None:
    table = guarded.table(guarded.issue("nodes/node-7", days=30, ago=31))
    node = federation.node("node-7", broker=table)
    await node.failed(5, f"{HOST}:{guarded.port}: ", f"{table['cert_file']}: it has expired", "meerkat certs")


async def test_an_expired_certificate_of_the_broker_is_named_until_it_is_renewed(guarded: Guarded) -> None:
    """A fleet that ended for it would have to be started again by hand."""
    guarded.issue("broker", days=30, ago=31, hosts=[HOST])
    guarded.broker.kill()
    guarded.broker.start()
    with capture_logs() as logs:
        waiting = Peer(guarded.way("nodes/node-0"), "a")
        await until(lambda: len(logs) >= 2)
        assert {entry["event"] for entry in logs} == {"broker unreachable"}
        assert "the broker's certificate is out of date" in logs[0]["problem"]
        list(write_certificates(guarded.certificates, hosts=[HOST], renew=True))
        guarded.reload()
        await waiting.connected()
        await waiting.leave()


@own_words
async def test_a_node_with_anothers_certificate_names_it_and_goes_on(federation: Federation, guarded: Guarded) -> None:
    rightful = federation.node("node-1", broker=guarded.table("nodes/node-1"))
    wrong = federation.node("node-0", broker=guarded.table("nodes/node-1"))
    server = federation.server(rounds=PACE, broker=guarded.table("server"))
    await server.says("in charge")
    line = await wrong.says("connection lost", short_lived=3)
    file = guarded.table("nodes/node-1")["cert_file"]
    assert f"{file} is the certificate of 'node-1', and this is 'node-0'" in line["hint"]
    assert not any("another process" in line.get("hint", "") for line in wrong.said("connection lost"))
    assert not any("certificate" in line.get("hint", "") for line in rightful.said("connection lost"))
    for name in ("cert.pem", "key.pem"):  # mended in place: no restart
        folder = Path(file).parent
        (folder / name).write_bytes((folder.parent / "node-0" / name).read_bytes())
    await federation.eye.status("node-0", "online")
    assert not wrong.over
