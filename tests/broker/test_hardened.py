"""`broker/mosquitto-tls.conf` (and NATS's) with what `meerkat certs` makes: who may do what."""

import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from meerkat_mq.broker.certs import Authority, write_certificates
from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import BadCredentials, BrokerError
from meerkat_mq.mqtt import Message, Will
from tests.server.federation import NAME, TOPICS, Federation, all_end
from tests.support.broker import HOST, Broker
from tests.support.mosquitto import ShippedMosquitto
from tests.support.nats import Nats
from tests.support.peer import Peer, peer
from tests.support.waiting import until

BROKERS = Path(__file__).parents[2] / "broker"
NODES = ("node-0", "node-1")

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
    "meerkat/v1/another/up/node-0/update",
    "anything",
]


class Guarded:
    """A broker with a configuration of ours for a network, and the way to it for each user."""

    def __init__(self, folder: Path, *, nats: bool) -> None:
        self.certificates = folder / "certificates"
        *_, last = write_certificates(self.certificates, federation=NAME, hosts=[HOST], nodes=NODES)
        assert last.folder.name == NODES[-1]
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
    async with Federation(tmp_path, guarded.way("server")) as running:
        yield running


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
async def test_a_node_writes_nowhere_but_below_its_own_up(guarded: Guarded, topic: str) -> None:
    own = TOPICS.up("node-0", "update")
    async with peer(guarded.way("server"), "eye", [(f"{TOPICS.root}/#", 1)]) as eye, node(guarded, 0) as a:
        for retain in (False, True):
            a.session.publish(topic, b"forged", retain=retain)
        a.session.publish(own, b"mine")
        await until(lambda: eye.messages)
        assert [(message.topic, message.payload) for message in eye.messages] == [(own, b"mine")]
    async with peer(guarded.way("server"), "late", [(f"{TOPICS.root}/#", 1)]) as late:  # nor was it kept
        await late.session.publish(own, b"end")
        await until(lambda: late.messages)
        assert late.payloads == [b"end"]


@pytest.mark.not_on(mosquitto="drops in silence what NATS refuses aloud; the tests above")
async def test_nats_acknowledges_nothing_that_is_not_allowed(guarded: Guarded) -> None:
    own = TOPICS.up("node-0", "update")
    async with peer(guarded.way("server"), "eye", [(f"{TOPICS.root}/#", 1)]) as eye:
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
        own = f"{TOPICS.root}/up/node-{number}/other"
        way = guarded.way(f"nodes/node-{number}")
        dying = Peer(way, f"client-{number}", [(own, 1)], react=fail, will=lambda link: Will(status, words))
        await dying.connected()
        dying.session.publish(own, b"")
        with pytest.raises(ArithmeticError):
            await dying.task

    async with peer(guarded.way("server"), "eye", [(status, 1)]) as eye:
        await die(0, b"forged")
        await die(1, b"true")
        await until(lambda: eye.messages)
        assert eye.payloads == [b"true"]


@own_words
async def test_a_node_that_was_stolen_is_shut_out_by_two_lines(guarded: Guarded) -> None:
    own = TOPICS.up("node-0", "update")
    async with peer(guarded.way("server"), "eye", [(f"{TOPICS.root}/#", 1)]) as eye, node(guarded, 0) as stolen:
        await stolen.session.publish(own, b"before")
        await until(lambda: eye.payloads == [b"before"])
        with (guarded.certificates / "broker/acl").open("a") as acl:
            acl.write("\nuser node-0\ntopic deny #\n")
        guarded.reload()
        async with node(guarded, 1) as b:
            stolen.session.publish(own, b"after")
            await stolen.session.drain(5)
            b.session.publish(TOPICS.up("node-1", "update"), b"end")
            await until(lambda: b"end" in eye.payloads)
        assert eye.payloads == [b"before", b"end"]
    list(write_certificates(guarded.certificates, federation=NAME, renew=True))
    assert (guarded.certificates / "broker/acl").read_text().endswith("\ntopic deny #\n")


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
