"""What a session finds out about a broker that ends its connections, or drops what it says."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from meerkat_mq.broker.certs import Authority
from meerkat_mq.config import BrokerConfig
from meerkat_mq.mqtt import Timeouts, Will
from tests.support.mosquitto import HOST, Mosquitto
from tests.support.peer import Peer
from tests.support.proxy import PUBACK, PUBLISH, SUBSCRIBE, Packet, Proxy
from tests.support.waiting import until

MakeMosquitto = Callable[..., Mosquitto]
QUICK = Timeouts(connect_s=1, back_off_first_s=0.02, back_off_cap_s=0.05, refused_cap_s=0.4, echo_s=0.3)
STATUS = "f/up/a/status"


def owner(broker: BrokerConfig, *, name: str = "a", greeting: Sequence[tuple[str, bytes]] = (), **options: Any) -> Peer:
    """A session with a will, that says on each connection that it is there."""

    def greet(link: int) -> None:
        made.session.publish(STATUS, b"online", retain=True)
        for topic, payload in greeting:
            made.session.publish(topic, payload, retain=True)

    made = Peer(
        broker, name, timeouts=QUICK, name=name, greet=greet, will=lambda link: Will(STATUS, b"lost"), **options
    )
    return made


async def the_line(peer: Peer, find: Callable[[dict[str, Any]], bool]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line that is looked for, and all lines until then."""
    with capture_logs() as logs:
        await until(lambda: [line for line in logs if find(dict(line))] or peer.task.done(), within_s=20)
        if not peer.task.done():
            await peer.leave()
    return next(dict(line) for line in logs if find(dict(line))), [dict(line) for line in logs]


def hints(word: str) -> Callable[[dict[str, Any]], bool]:
    return lambda line: word in line.get("hint", "")


async def test_a_packet_that_is_too_large_is_named_with_its_size_and_slows_down(make_mosquitto: MakeMosquitto) -> None:
    broker = make_mosquitto("max_packet_size 8192")
    greeting = [("f/small", b"x")] * 3 + [("f/blob/0", bytes(20_000)), ("f/blob/1", bytes(20_000))]
    line, _ = await the_line(owner(broker.config, greeting=greeting), hints("packet limit is lower"))
    assert "f/blob/0 (20016 bytes)" in line["hint"]
    assert line["sending"] == ("f/blob/0",)
    assert "max_packet_size" in line["hint"]


async def test_pauses_grow_where_each_connection_ends_at_the_same_message(make_mosquitto: MakeMosquitto) -> None:
    broker = make_mosquitto("message_size_limit 8192")
    peer = owner(broker.config, greeting=[("f/blob/0", bytes(20_000))])
    line, _ = await the_line(peer, lambda line: line.get("retry_in_s", 0) > QUICK.back_off_cap_s)
    assert "f/blob/0" in line["hint"]


async def test_a_broker_that_closes_for_a_will_says_what_it_lacks(make_mosquitto: MakeMosquitto) -> None:
    broker = make_mosquitto("retain_available false")
    line, logs = await the_line(owner(broker.config), hints("retain_available"))
    assert line["event"] == "broker unreachable"
    assert "last will" in line["hint"]
    assert logs[0]["problem"] == "the broker closed the connection"


async def test_a_broker_that_forgets_what_is_retained_is_named(proxy: Proxy) -> None:
    def forget(packet: Packet) -> bytes:
        kept = packet.up and packet.kind == PUBLISH
        return bytes([packet.data[0] & ~1]) + packet.data[1:] if kept else packet.data

    proxy.alter = forget
    peer = owner(proxy.config)
    line, _ = await the_line(peer, lambda line: "keeps no retained messages" in line["event"])
    assert (line["topic"], "hint" in line) == (STATUS, False)
    assert peer.payloads.count(b"online") == 1  # as it came by itself


async def test_a_broker_that_keeps_what_is_retained_is_asked_once_and_nobody_hears_of_it(proxy: Proxy) -> None:
    peer = await owner(proxy.config).connected()
    # Its own message, and the answer to what it asks: both are taken before the connection ends.
    await until(lambda: proxy.count(PUBACK, up=True) == 2)
    assert proxy.count(SUBSCRIBE, up=True) == 2
    assert peer.payloads == [b"online"]
    with capture_logs() as logs:
        proxy.reset()
        await peer.connected(2)
        await peer.session.drain(5)
        await peer.leave()
    assert proxy.count(SUBSCRIBE, up=True) == 3
    assert {line["event"] for line in logs} <= {"connection lost", "connected"}
    assert all(message.payload in (b"online", b"lost") for message in peer.messages)


class Bound:
    """A broker that gives rights and client ids by certificate, and the ways to it."""

    def __init__(self, folder: Path, make_mosquitto: MakeMosquitto, acl: str, *lines: str) -> None:
        self.folder = folder
        authority = Authority.create(folder / "ca", days=30)
        authority.issue(folder / "broker", "broker", days=30, hosts=[HOST])
        for name in ("a", "b"):
            authority.issue(folder / name, name, days=30)
        (folder / "acl").write_text(acl)
        self.broker = make_mosquitto(
            f"cafile {folder}/ca/cert.pem",
            f"certfile {folder}/broker/cert.pem",
            f"keyfile {folder}/broker/key.pem",
            "require_certificate true",
            "use_identity_as_username true",
            f"acl_file {folder}/acl",
            *lines,
            anonymous=False,
        )

    def way(self, name: str) -> BrokerConfig:
        return BrokerConfig(
            url=f"mqtts://{HOST}:{self.broker.port}",
            ca_file=self.folder / "ca/cert.pem",
            cert_file=self.folder / name / "cert.pem",
            key_file=self.folder / name / "key.pem",
        )


async def test_a_certificate_of_another_is_named_instead_of_another_process(
    tmp_path: Path, make_mosquitto: MakeMosquitto
) -> None:
    bound = Bound(tmp_path, make_mosquitto, "topic readwrite #\n", "use_username_as_clientid true")
    with capture_logs() as logs:
        rightful = Peer(bound.way("b"), "b", timeouts=QUICK, name="b")
        wrong = owner(bound.way("b"))
        await until(lambda: [line for line in logs if hints("is the certificate of 'b', and this is 'a'")(dict(line))])
        await wrong.leave()
        await rightful.leave()
    told = [line for line in logs if "certificate of" in line.get("hint", "")]
    assert {line["client"] for line in told} == {"a"}
    assert not any("another process" in line["hint"] for line in told)


@pytest.mark.parametrize("acl", ["pattern readwrite f/up/%u/#\n", "user b\ntopic write f/#\n"], ids=["closes", "drops"])
async def test_an_acl_that_denies_our_own_topic_is_said_with_the_certificate(
    tmp_path: Path, make_mosquitto: MakeMosquitto, acl: str
) -> None:
    """Mosquitto 2.0.11 closes the connection of whoever writes where it may not; others drop that in silence."""
    bound = Bound(tmp_path, make_mosquitto, acl)
    line, _ = await the_line(owner(bound.way("b")), hints("is the certificate of 'b', and this is 'a'"))
    if "readwrite" not in acl:
        assert "does not pass it on: see its ACL" in line["event"]
        assert line["topic"] == STATUS


@pytest.mark.not_on(rabbitmq="it refuses a user that it does not know, before any message")
async def test_a_user_name_of_another_is_named(proxy: Proxy) -> None:
    proxy.alter = lambda packet: proxy.reset() if packet.up and packet.kind == PUBLISH else packet.data
    config = proxy.config.model_copy(update={"username": "b", "password": "x"})
    line, _ = await the_line(owner(config), hints("broker.username is 'b', and this is 'a'"))
    assert line["short_lived"] == 3


def test_own_certificates_that_no_broker_takes_say_why(tmp_path: Path) -> None:
    from datetime import UTC, datetime, timedelta

    from meerkat_mq.mqtt.tls import certificate_flaws

    authority, now = Authority.create(tmp_path / "ca", days=30), datetime.now(UTC)

    def flaws(name: str, **options: Any) -> str:
        authority.issue(tmp_path / "own", name, days=10, **options)
        config = BrokerConfig(url="mqtts://h", cert_file=tmp_path / "own/cert.pem", key_file=tmp_path / "own/key.pem")
        return "; ".join(certificate_flaws(config, "a"))

    assert flaws("a") == ""
    assert "is the certificate of 'b', and this is 'a'" in flaws("b")
    assert "has expired on" in flaws("a", now=now - timedelta(days=20))
    assert "by the clock here" in flaws("a", now=now + timedelta(days=5))
    assert "for brokers, not for clients" in flaws("a", hosts=[HOST])
    os.truncate(tmp_path / "own/cert.pem", 100)
    assert certificate_flaws(BrokerConfig(url="mqtts://h", cert_file=tmp_path / "own/cert.pem"), "a") == ()
