"""Refusals that pass: who was connected before tries again, in words, with pauses that grow."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from structlog.testing import capture_logs

from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import BadCredentials, BrokerError, ConfigError
from meerkat_mq.mqtt import Marker
from meerkat_mq.mqtt.trouble import BackOff
from tests.mqtt.test_refusals import PASSWORDS
from tests.support.mosquitto import HOST, Mosquitto
from tests.support.peer import Peer, peer
from tests.support.proxy import CONNACK, CONNECT, SUBACK, Packet, Proxy
from tests.support.waiting import until

MakeMosquitto = Callable[..., Mosquitto]


class Hiccups:
    """A broker with users, certificates and keys, and the ways in which all that can be wrong for a while."""

    def __init__(self, folder: Path, make_mosquitto: MakeMosquitto) -> None:
        self.folder = folder
        self._ca = trustme.CA()
        self._passwords = folder / "passwords"
        self._passwords.write_text(PASSWORDS + "\n")
        self._ca.cert_pem.write_to_path(folder / "ca.pem")
        self.issue(self._ca, "server", HOST)
        self.issue(self._ca, "client", "node")
        lines = (
            f"cafile {folder}/ca.pem",
            f"certfile {folder}/server.pem",
            f"keyfile {folder}/server.key",
            f"password_file {self._passwords}",
            "require_certificate true",
        )
        self.broker = make_mosquitto(*lines, anonymous=False)
        self.config = BrokerConfig(
            url=f"mqtts://{HOST}:{self.broker.port}",
            username="node",
            password="right",
            ca_file=folder / "own-ca.pem",
            cert_file=folder / "client.pem",
            key_file=folder / "client.key",
        )
        shutil.copy(folder / "ca.pem", folder / "own-ca.pem")

    def issue(self, ca: trustme.CA, name: str, identity: str, *, parts: str = "cert key") -> None:
        issued = ca.issue_cert(identity, common_name=identity)
        if "cert" in parts:
            issued.cert_chain_pems[0].write_to_path(self.folder / f"{name}.pem")
        if "key" in parts:
            issued.private_key_pem.write_to_path(self.folder / f"{name}.key")

    def restart(self) -> None:
        self.broker.kill()
        self.broker.start()

    def empty_passwords(self) -> Callable[[], object]:
        """The store is written anew, and read in between; who is connected is thrown out."""
        self._passwords.write_text("")
        self.restart()

        def heal() -> None:
            self._passwords.write_text(PASSWORDS + "\n")
            os.kill(self.broker.pid, signal.SIGHUP)

        return heal

    def another_server(self) -> Callable[[], object]:
        """Somebody else answers on the port, with a certificate of its own, as a captive portal does."""
        self.issue(trustme.CA(), "server", HOST)
        self.restart()

        def heal() -> None:
            self.issue(self._ca, "server", HOST)
            self.restart()

        return heal

    def no_ca(self) -> Callable[[], object]:
        whole = self.config.ca_file
        assert whole is not None
        aside = whole.rename(whole.with_suffix(".aside"))
        self.restart()
        return lambda: aside.rename(whole)

    def half_a_ca(self) -> Callable[[], object]:
        file = self.config.ca_file
        assert file is not None
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        self.restart()
        return lambda: file.write_bytes(whole)

    def certificate_before_key(self) -> Callable[[], object]:
        key = (self.folder / "client.key").read_bytes()
        self.issue(self._ca, "client", "node", parts="key")  # the old certificate with the new key
        self.restart()
        return lambda: (self.folder / "client.key").write_bytes(key)

    def broken_certificate(self) -> Callable[[], object]:
        certificate = (self.folder / "client.pem").read_bytes()
        (self.folder / "client.pem").write_bytes(b"")
        self.restart()
        return lambda: (self.folder / "client.pem").write_bytes(certificate)

    def foreign_certificate(self) -> Callable[[], object]:
        self.issue(trustme.CA(), "client", "node")
        self.restart()
        return lambda: self.issue(self._ca, "client", "node")


Fault = Callable[[Hiccups], Callable[[], object]]
FAULTS: dict[Fault, tuple[type[Exception], str]] = {
    Hiccups.empty_passwords: (BadCredentials, "refuses user 'node'"),
    Hiccups.another_server: (BrokerError, "its certificate does not verify"),
    Hiccups.no_ca: (ConfigError, "broker.ca_file"),
    Hiccups.half_a_ca: (ConfigError, "broker.ca_file"),
    Hiccups.certificate_before_key: (ConfigError, "broker.cert_file"),
    Hiccups.broken_certificate: (ConfigError, "broker.cert_file"),
    Hiccups.foreign_certificate: (BadCredentials, "refuses the client certificate"),
}
each_fault = pytest.mark.parametrize(
    ("fault", "error", "words"),
    [(fault, *said) for fault, said in FAULTS.items()],
    ids=lambda it: getattr(it, "__name__", ""),
)


@pytest.fixture
def hiccups(tmp_path: Path, make_mosquitto: MakeMosquitto) -> Hiccups:
    return Hiccups(tmp_path, make_mosquitto)


def refusals(logs: list[Any]) -> list[Any]:
    return [entry for entry in logs if entry["event"] == "cannot connect"]


@each_fault
async def test_it_is_tried_again_in_this_process_and_in_the_next(
    hiccups: Hiccups,
    tmp_path: Path,
    fault: Fault,
    error: type[Exception],
    words: str,
) -> None:
    marker = Marker(tmp_path, hiccups.config, "a")
    with capture_logs() as logs:
        a = await Peer(hiccups.config, "a", marker=marker).connected()
        await until(marker.is_there)
        heal = fault(hiccups)
        await until(lambda: refusals(logs))
        await a.leave()
        again = Peer(hiccups.config, "a", marker=Marker(tmp_path, hiccups.config, "a"))  # as after a reboot
        await until(lambda: len(refusals(logs)) >= 2)
        with pytest.raises(error, match=words):
            await Peer(hiccups.config, "b", marker=Marker(tmp_path / "b", hiccups.config, "b")).task
        heal()
        await again.connected()
        await again.leave()
    for line in refusals(logs):
        assert words in line["problem"]
        assert line["log_level"] == "warning"
        assert line["retry_in_s"] > 0


async def test_a_refused_subscription_is_tried_again_after_it_worked(proxy: Proxy) -> None:
    async with peer(proxy.config, "a", [("x", 1)]) as a:

        def refuse(packet: Packet) -> bytes:
            return packet.data[:-1] + b"\x80" if packet.kind == SUBACK else packet.data

        with capture_logs() as logs:
            proxy.alter = refuse
            proxy.reset()
            await until(lambda: refusals(logs))
            assert "refuses the subscription" in refusals(logs)[0]["problem"]
            proxy.pass_all()
            await a.connected(2)
            proxy.alter = refuse
            a.session.subscribe("y")  # on a connection that stands
            await until(lambda: len(a.reasons) == 2)
            assert a.reasons[1].startswith("y: ")
            proxy.pass_all()
            await a.connected(3)


async def test_a_refused_client_id_is_tried_again_after_it_worked(proxy: Proxy) -> None:
    async with peer(proxy.config, "a") as a:
        proxy.alter = lambda packet: bytes([0x20, 2, 0, 2]) if packet.kind == CONNACK else packet.data
        proxy.reset()
        await until(lambda: proxy.count(CONNACK, up=False) >= 3)
        proxy.pass_all()
        await a.connected(2)


async def test_a_cap_on_the_keep_alive_is_named(proxy: Proxy) -> None:
    """As Mosquitto's max_keepalive since 2.0.12: a keep-alive over it is answered as if the client id were wrong."""

    def cap(packet: Packet) -> bytes:
        long = any(int.from_bytes(c.data[10:12]) > 20 for c in proxy.packets if c.kind == CONNECT)
        return bytes([0x20, 2, 0, 2]) if packet.kind == CONNACK and long else packet.data

    proxy.alter = cap
    with pytest.raises(BrokerError, match=r"client id 'a'.*keep-alive of 30 s.*lower broker\.keep_alive_s"):
        await Peer(proxy.config, "a").task
    proxy.packets.clear()
    async with peer(proxy.config.model_copy(update={"keep_alive_s": 20}), "a") as a:
        assert a.up


async def test_give_up_never_and_always(hiccups: Hiccups) -> None:
    heal = hiccups.empty_passwords()
    patient = Peer(hiccups.config.model_copy(update={"give_up": "never"}), "patient")
    with pytest.raises(BadCredentials):
        await Peer(hiccups.config, "a").task
    assert not patient.task.done()
    heal()
    await patient.connected()
    await patient.leave()
    always = await Peer(hiccups.config.model_copy(update={"give_up": "always"}), "always").connected()
    hiccups.empty_passwords()
    with pytest.raises(BadCredentials):
        await always.task


async def test_a_marker_that_cannot_be_written_or_read_ends_nobody(hiccups: Hiccups, tmp_path: Path) -> None:
    marker = Marker(tmp_path, hiccups.config, "a")
    marker.file.mkdir()
    with capture_logs() as logs:
        async with peer(hiccups.config, "a", marker=marker) as a:
            await until(lambda: [entry for entry in logs if entry["event"] == "marker not written"])
            assert a.up
        heal = hiccups.empty_passwords()
        again = Peer(hiccups.config, "a", marker=marker)
        await until(lambda: refusals(logs))
        heal()
        await again.connected()
        await again.leave()


def test_a_marker_is_of_one_broker_and_one_client(tmp_path: Path) -> None:
    here = BrokerConfig(url="mqtt://here")
    Marker(tmp_path, here, "a").leave()
    assert Marker(tmp_path, BrokerConfig(url="mqtt://HERE:1883/", username="u", password="p"), "a").is_there()
    for broker, client in (
        (BrokerConfig(url="mqtts://here:1883"), "a"),
        (BrokerConfig(url="mqtt://b"), "a"),
        (here, "b"),
    ):
        assert not Marker(tmp_path, broker, client).is_there()
    assert (
        b"p"
        not in Marker(tmp_path, BrokerConfig(url="mqtt://x", username="u", password="p"), "c").file.read_bytes()[:0]
    )


def test_refusals_are_tried_about_once_a_minute_at_last_and_a_broker_that_is_away_every_four_seconds() -> None:
    back_off = BackOff(1.0, 4.0, 60.0)
    for step in (1, 2, 4, 8, 16, 32, 60, 60):
        assert 0.1 * step <= back_off.pause_s(refused=True) <= step
    assert back_off.pause_s() <= 4
    assert back_off.pause_s() <= 4
