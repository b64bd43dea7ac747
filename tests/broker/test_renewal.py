"""`meerkat certs renew`, and what says a month before that it is time for it."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from structlog.testing import capture_logs

from meerkat_mq.broker.certs import revoke_certificates, write_certificates
from meerkat_mq.config import BrokerConfig
from meerkat_mq.mqtt import Marker, Timeouts
from meerkat_mq.mqtt.connection import Connection
from meerkat_mq.mqtt.expiry import CERTIFICATES_FILE, Expiry, expiries, keep, kept
from tests.broker.guarded import NODES, Guarded, node, own_words, without_rabbitmq
from tests.ledger.ledgers import Writer
from tests.server.federation import NAME, Federation
from tests.support.broker import HOST
from tests.support.command import Meerkat
from tests.support.peer import Peer, peer
from tests.support.waiting import until

DAY = timedelta(days=1)


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())


def days_left(folder: Path) -> int:
    return (certificate(folder).not_valid_after_utc - datetime.now(UTC)).days


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Everything that this federation has expires in ten days, but what node b has."""
    list(
        write_certificates(tmp_path / "pki", federation="field", hosts=["broker.example", "::1"], nodes=["a"], days=10)
    )
    list(write_certificates(tmp_path / "pki", nodes=["b"]))
    return tmp_path / "pki"


def test_what_expires_within_a_month_is_made_anew_with_the_same_names(meerkat: Meerkat, folder: Path) -> None:
    before = {home: certificate(folder / home) for home in ("broker", "server", "observer", "nodes/a", "nodes/b")}
    done = meerkat("certs", "renew", folder)
    assert done.code == 0
    assert f"{folder}/nodes/a: valid until" in done.out
    assert "systemctl reload mosquitto" in done.out
    for home, old in before.items():
        new = certificate(folder / home)
        assert (new.serial_number == old.serial_number) == (home == "nodes/b")
        assert new.subject == old.subject
        assert days_left(folder / home) > 390
    names = certificate(folder / "broker").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.example"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["::1"]
    again = meerkat("certs", "renew", folder)
    assert (again.code, again.out.strip()) == (0, f"{folder}: nothing expires within 30 days")


def test_within_and_ids_choose(meerkat: Meerkat, folder: Path) -> None:
    assert "nothing expires within 9 days" in meerkat("certs", "renew", folder, "--within", 9).out
    assert meerkat("certs", "renew", folder, "b", "meerkat.server", "--days", 50).code == 0
    assert [days_left(folder / home) for home in ("nodes/b", "server", "nodes/a")] == [49, 49, 9]


def test_a_revoked_id_is_not_let_in_again_by_the_way(meerkat: Meerkat, folder: Path) -> None:
    revoke_certificates(folder, ["a"])
    old = certificate(folder / "nodes/a").serial_number
    assert f"{folder}/nodes/a: was revoked" in meerkat("certs", "renew", folder).out
    assert certificate(folder / "nodes/a").serial_number == old
    assert meerkat("certs", "renew", folder, "a").code == 0
    assert certificate(folder / "nodes/a").serial_number != old


def test_a_ca_that_ends_is_named_since_nothing_that_it_signs_is_good_for_longer(
    meerkat: Meerkat, tmp_path: Path
) -> None:
    list(write_certificates(tmp_path, nodes=["a"], ca_days=20))
    done = meerkat("certs", "renew", tmp_path)
    assert f"{tmp_path}/ca: expires on" in done.out
    assert f"{tmp_path}/nodes/a: expires with its CA" in done.out


@pytest.mark.parametrize("name", ["c", "../ca", "broker"])
def test_an_id_without_a_certificate_is_named_and_nothing_renewed(meerkat: Meerkat, folder: Path, name: str) -> None:
    before = certificate(folder / "nodes/a").serial_number
    meerkat("certs", "renew", folder, "a", name).failed(2, repr(name))
    assert certificate(folder / "nodes/a").serial_number == before


def test_words_of_an_expiry() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)

    def words(days: int) -> str:
        return Expiry("client certificate", "c.pem", now + timedelta(days=days, hours=1)).warning(now)

    assert words(30) == ""
    assert words(29).startswith("the client certificate c.pem expires in 29 days, on 2026-01-30: make a new one with")
    assert "in 1 day, on" in words(1)
    assert "has expired on 2025-12-31" in words(-1)


def test_status_warns_of_what_the_server_found(meerkat: Meerkat, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "state")
    writer.round()
    assert "expires" not in meerkat("status", tmp_path / "state").out
    keep(tmp_path / "state", [Expiry("CA", "/x/ca.pem", datetime.now(UTC) + 3 * DAY)])
    for flags in ([], ["--json"]):
        assert "the CA /x/ca.pem expires in 2 days" in " ".join(
            meerkat("status", tmp_path / "state", *flags).out.split()
        )
    for damage in (
        "junk",
        "[]",
        '[{"what": 1}]',
        '{"until": "x"}',
        '[{"what": "a", "place": "b", "until": "c"}]',
        "[1]",
    ):
        (tmp_path / "state" / CERTIFICATES_FILE).write_text(damage)
        assert meerkat("status", tmp_path / "state").code == 0


@without_rabbitmq
@own_words
async def test_a_service_says_it_a_month_before_of_all_that_keeps_it_connected(
    guarded: Guarded, tmp_path: Path
) -> None:
    """Its own certificate and the broker's; the CA is good for longer."""
    list(write_certificates(guarded.certificates, nodes=NODES[:1], hosts=[HOST], days=10, renew=True))
    guarded.broker.stop()
    guarded.broker.start()
    way = guarded.way(f"nodes/{NODES[0]}")
    with capture_logs() as logs:
        one = Peer(way, "a", marker=Marker(tmp_path, way, "a"))
        await one.connected()
        await until(lambda: sum(entry["event"] == "certificate expires" for entry in logs) == 2)
        await one.leave()
    said = [entry["problem"] for entry in logs if entry["event"] == "certificate expires"]
    assert f"the client certificate {way.cert_file} expires in 9 days, on" in said[0]
    assert f"the certificate of the broker {way.address} expires in 9 days, on" in said[1]
    assert [one.what for one in kept(tmp_path)] == ["client certificate", "CA", "certificate of the broker"]
    with capture_logs() as logs:
        async with node(guarded, 1), peer(guarded.way("server"), "server"):
            pass
    assert [entry for entry in logs if NODES[1] in entry.get("problem", "")] == []


@without_rabbitmq
@own_words
async def test_a_connection_that_has_ended_knows_no_certificate_and_harms_nobody(guarded: Guarded) -> None:
    way, timeouts = guarded.way("nodes/node-0"), Timeouts()
    connection = Connection(way, "a", will=None, on_message=lambda message: None, timeouts=timeouts)
    assert connection.broker_until is None
    await connection.open()
    assert connection.broker_until == certificate(guarded.certificates / "broker").not_valid_after_utc
    guarded.broker.kill()
    await connection.ended
    assert connection.broker_until is None
    await connection.end(orderly=False)
    assert connection.broker_until is None


@pytest.mark.parametrize("text", ["", "junk", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"])
def test_a_file_that_is_no_certificate_has_no_end(tmp_path: Path, text: str) -> None:
    file = tmp_path / "cert.pem"
    file.write_text(text)
    assert expiries(BrokerConfig(url="mqtts://h", cert_file=file, ca_file=tmp_path / "none.pem")) == ()


@without_rabbitmq
@own_words
async def test_a_server_leaves_it_for_status_and_a_renewed_certificate_ends_it(
    meerkat: Meerkat, federation: Federation, guarded: Guarded
) -> None:
    list(write_certificates(guarded.certificates, federation=NAME, days=10, renew=True))
    server = federation.server(rounds={}, broker=guarded.table("server"))
    line = await server.says("certificate expires")
    assert str(guarded.way("server").cert_file) in line["problem"]
    await server.says("in charge")  # there is no status of a ledger without a run
    folder = server.config.with_suffix("")
    assert "expires in 9 days" in " ".join(meerkat("status", folder).out.split())
    assert meerkat("certs", "renew", guarded.certificates, "meerkat.server").code == 0
    server.kill()
    again = federation.server(rounds={}, broker=guarded.table("server"))
    await again.says("connected")
    await until(lambda: "expires in" not in meerkat("status", folder).out)


# --- meerkat doctor --config ---


def config(folder: Path, home: str, **settings: str) -> Path:
    table = {"url": "mqtts://broker.example", "ca_file": "ca.pem", "cert_file": "cert.pem", "key_file": "key.pem"}
    file = folder / home / "node.toml"
    keys = "".join(f'{key} = "{value}"\n' for key, value in (table | settings).items() if value)
    file.write_text(f'id = "a"\nfederation = "f"\ndata = "d"\nstate_dir = "s"\n[broker]\n{keys}')
    return file


def test_doctor_says_what_is_wrong_with_the_way_to_the_broker(meerkat: Meerkat, folder: Path) -> None:
    assert meerkat("certs", "renew", folder, "a", "b").code == 0
    good = meerkat("doctor", "--config", config(folder, "nodes/a"))
    assert (good.code, "✗" in good.out) == (0, False)
    assert "valid until" in good.out
    wrong = meerkat("doctor", "--config", config(folder, "nodes/b"))
    assert (wrong.code, "is the certificate of 'b', and this is 'a'" in wrong.out) == (5, True)
    (folder / "nodes/a/key.pem").chmod(0o644)
    open_key = meerkat("doctor", "--config", config(folder, "nodes/a"), "--json")
    found = [json.loads(line) for line in open_key.out.splitlines()]
    assert [one["step"] for one in found if not one["good"]] == ["key"]
    assert meerkat("certs", "renew", folder, "a", "--days", 5).code == 0
    soon = meerkat("doctor", "--config", config(folder, "nodes/a"))
    assert (soon.code, "expires in 4 days" in soon.out) == (5, True)
    plain = {"url": "mqtt://broker.example", "ca_file": "", "cert_file": "", "key_file": ""}
    password = meerkat("doctor", "--config", config(folder, "nodes/a", **plain, username="a", password="s3cret"))
    assert (password.code, "✗ password" in password.out, "s3cret" in password.out) == (5, True, False)
    meerkat("doctor").failed(2, "--model or --config")
