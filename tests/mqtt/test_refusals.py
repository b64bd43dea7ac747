"""What ends a session that was never connected, in words, instead of being tried for ever."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from structlog.testing import capture_logs

from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import BadCredentials, BrokerError, ConfigError
from tests.support.mosquitto import HOST, Mosquitto
from tests.support.peer import Peer, peer
from tests.support.proxy import CONNACK, SUBACK, Packet, Proxy
from tests.support.waiting import until

MakeMosquitto = Callable[..., Mosquitto]

# user "node", password "right": made with mosquitto_passwd
PASSWORDS = (
    "node:$7$101$AT8QmzjMQxC3nfaq$Y3oYXNg/21h854ZWDfeLlztzFFyWaZ/XJV32P+sI0"
    "WCLuyGon6ZNmD/P3hHBNglVKLA5t9XRJAOqT53PnRQlSg=="
)


@pytest.fixture
def guarded(make_mosquitto: MakeMosquitto, tmp_path: Path) -> Mosquitto:
    """A broker that knows one user."""
    (tmp_path / "passwords").write_text(PASSWORDS + "\n")
    return make_mosquitto(f"password_file {tmp_path}/passwords", anonymous=False)


async def test_the_right_password_is_taken(guarded: Mosquitto) -> None:
    async with peer(BrokerConfig(url=guarded.url, username="node", password="right"), "a") as a:
        assert a.up


async def test_wrong_credentials_stop_the_session(guarded: Mosquitto) -> None:
    a = Peer(BrokerConfig(url=guarded.url, username="node", password="wrong"), "a")
    waiting = a.session.publish("x", b"")
    with pytest.raises(BadCredentials, match=rf"^{HOST}:{guarded.port}: refuses user 'node'.*broker\.password"):
        await a.task
    with pytest.raises(BrokerError, match="has ended"):
        await waiting
    assert guarded.log.count("New connection") == 2  # the helper's, and ours


async def test_no_credentials_where_they_are_needed_stop_the_session(guarded: Mosquitto) -> None:
    a = Peer(guarded.config, "a")
    with pytest.raises(BadCredentials, match="without a user name"):
        await a.task


async def test_a_refused_client_id_stops_the_session(proxy: Proxy) -> None:
    proxy.alter = lambda packet: bytes([0x20, 2, 0, 2]) if packet.kind == CONNACK else packet.data
    a = Peer(proxy.config, "a")
    with pytest.raises(BrokerError, match=r"client id 'a', or a keep-alive of 30 s.*broker\.keep_alive_s"):
        await a.task


async def test_a_broker_that_is_busy_is_tried_again(proxy: Proxy) -> None:
    proxy.alter = lambda packet: bytes([0x20, 2, 0, 3]) if packet.kind == CONNACK else packet.data
    a = Peer(proxy.config, "a")
    await until(lambda: proxy.connections >= 2)
    proxy.pass_all()
    await a.connected()
    await a.leave()


async def test_a_refused_subscription_stops_the_session(proxy: Proxy) -> None:
    def refuse(packet: Packet) -> bytes:
        return packet.data[:-1] + b"\x80" if packet.kind == SUBACK else packet.data

    proxy.alter = refuse
    a = Peer(proxy.config, "a", [("x", 1), ("secret/+", 1)])
    with pytest.raises(BrokerError, match=r"secret/\+.*refuses the subscription.*ACL"):
        await a.task


class Authority:
    """A CA, a broker's certificate of it, a client's."""

    def __init__(self, folder: Path) -> None:
        ca = trustme.CA()
        self.ca_file = folder / "ca.pem"
        self.cert_file = folder / "client.pem"
        self.key_file = folder / "client.key"
        ca.cert_pem.write_to_path(self.ca_file)
        server, client = ca.issue_cert(HOST), ca.issue_cert("node-1")
        server.private_key_pem.write_to_path(folder / "server.key")
        server.cert_chain_pems[0].write_to_path(folder / "server.pem")
        client.private_key_pem.write_to_path(self.key_file)
        client.cert_chain_pems[0].write_to_path(self.cert_file)
        self.lines = [
            f"cafile {self.ca_file}",
            f"certfile {folder}/server.pem",
            f"keyfile {folder}/server.key",
        ]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def encrypted(broker: Mosquitto, **settings: Path) -> BrokerConfig:
    return BrokerConfig(url=f"mqtts://{HOST}:{broker.port}", **settings)  # type: ignore[arg-type]


async def test_tls_round_trip(make_mosquitto: MakeMosquitto, authority: Authority) -> None:
    broker = make_mosquitto(*authority.lines)
    async with peer(encrypted(broker, ca_file=authority.ca_file), "a", [("x", 1)]) as a:
        await a.session.publish("x", bytes(100_000))
        await until(lambda: a.payloads == [bytes(100_000)])


async def test_a_certificate_of_another_ca_stops_the_session(
    make_mosquitto: MakeMosquitto, authority: Authority, tmp_path: Path
) -> None:
    broker = make_mosquitto(*authority.lines)
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    a = Peer(encrypted(broker, ca_file=other), "a")
    with pytest.raises(BrokerError, match=rf"{broker.port}: its certificate does not verify against {other}.*ca_file"):
        await a.task


async def test_a_certificate_for_another_name_stops_the_session(
    make_mosquitto: MakeMosquitto, authority: Authority
) -> None:
    broker = make_mosquitto(*authority.lines)
    config = BrokerConfig(url=f"mqtts://localhost:{broker.port}", ca_file=authority.ca_file)
    with pytest.raises(BrokerError, match=r"does not verify.*broker\.url"):
        await Peer(config, "a").task


async def test_a_client_certificate_where_one_is_needed(make_mosquitto: MakeMosquitto, authority: Authority) -> None:
    broker = make_mosquitto(*authority.lines, "require_certificate true")
    config = encrypted(broker, ca_file=authority.ca_file, cert_file=authority.cert_file, key_file=authority.key_file)
    async with peer(config, "a") as a:
        assert a.up
    with pytest.raises(BadCredentials, match=r"refuses the client certificate.*broker\.cert_file"):
        await Peer(encrypted(broker, ca_file=authority.ca_file), "a").task


async def test_files_that_cannot_be_read_are_named(authority: Authority, tmp_path: Path) -> None:
    url = f"mqtts://{HOST}:1"
    missing = tmp_path / "missing.pem"
    with pytest.raises(ConfigError, match=rf"broker\.ca_file: {missing}: No such file"):
        await Peer(BrokerConfig(url=url, ca_file=missing), "a").task
    with pytest.raises(ConfigError, match=r"broker\.ca_file.*PEM"):
        await Peer(BrokerConfig(url=url, ca_file=authority.key_file), "a").task
    with pytest.raises(ConfigError, match=r"broker\.cert_file.*PEM"):
        await Peer(BrokerConfig(url=url, cert_file=authority.cert_file, key_file=tmp_path / "no.key"), "a").task


async def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(
    authority: Authority, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization as pem

    key = pem.load_pem_private_key(authority.key_file.read_bytes(), None)
    hidden, format_ = pem.BestAvailableEncryption(b"secret"), pem.PrivateFormat.PKCS8
    authority.key_file.write_bytes(key.private_bytes(pem.Encoding.PEM, format_, hidden))
    config = BrokerConfig(url=f"mqtts://{HOST}:1", cert_file=authority.cert_file, key_file=authority.key_file)
    with pytest.raises(ConfigError, match=r"broker\.cert_file.*without a passphrase"):
        await Peer(config, "a").task


async def test_one_file_for_certificate_and_key(make_mosquitto: MakeMosquitto, authority: Authority) -> None:
    broker = make_mosquitto(*authority.lines, "require_certificate true")
    with authority.cert_file.open("ab") as both:
        both.write(authority.key_file.read_bytes())
    async with peer(encrypted(broker, ca_file=authority.ca_file, cert_file=authority.cert_file), "a") as a:
        assert a.up


async def test_plain_text_to_a_tls_port_and_back_are_tried_again(
    make_mosquitto: MakeMosquitto, authority: Authority, mosquitto: Mosquitto
) -> None:
    tls = make_mosquitto(*authority.lines)
    for config in (tls.config, encrypted(mosquitto, ca_file=authority.ca_file)):
        with capture_logs() as logs:
            a = Peer(config, "a")
            await until(lambda seen=logs: len(seen) >= 2)  # type: ignore[misc]
            await a.leave()
        assert {entry["event"] for entry in logs} == {"broker unreachable"}
