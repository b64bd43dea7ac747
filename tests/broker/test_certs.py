"""`meerkat certs`: what it writes, and what it refuses to write over."""

import shutil
import stat
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meerkat_mq.broker.certs import Authority, mosquitto_acl, write_certificates
from meerkat_mq.wire.topics import OBSERVER_NAME, SERVER_NAME, check_identifier
from tests.support.command import Meerkat

NAMES = ("broker.example", "192.0.2.7", "2001:db8::7")


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())


def common_name(folder: Path) -> object:
    return certificate(folder).subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a federation with two nodes."""
    list(write_certificates(tmp_path / "pki", federation="field", hosts=NAMES, nodes=["a", "b"]))
    return tmp_path / "pki"


def test_everybody_gets_a_folder_that_is_whole(folder: Path) -> None:
    ca = certificate(folder / "ca")
    homes = [folder / home for home in ("broker", "server", "observer", "nodes/a", "nodes/b")]
    assert [common_name(home) for home in homes] == ["broker", SERVER_NAME, OBSERVER_NAME, "a", "b"]
    for home in (folder / "ca", *homes):
        certificate(home).verify_directly_issued_by(ca)
        key = load_pem_private_key((home / "key.pem").read_bytes(), password=None)
        assert key.public_key() == certificate(home).public_key()
        assert stat.S_IMODE((home / "key.pem").stat().st_mode) == 0o600
    assert {(home / "ca.pem").read_bytes() for home in homes} == {(folder / "ca/cert.pem").read_bytes()}
    assert len({certificate(home).serial_number for home in homes}) == 5
    assert sorted(path.name for path in folder.rglob(".*")) == []


def test_each_certificate_is_good_for_one_thing(folder: Path) -> None:
    for home, purpose in (("broker", ExtendedKeyUsageOID.SERVER_AUTH), ("nodes/a", ExtendedKeyUsageOID.CLIENT_AUTH)):
        extensions = certificate(folder / home).extensions
        assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
        assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = certificate(folder / "broker").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.example"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address(name) for name in NAMES[1:]]


def test_no_node_can_have_the_servers_name() -> None:
    with pytest.raises(Exception, match="not a legal id"):
        check_identifier(SERVER_NAME, "id")


def test_validity_begins_before_clocks_that_are_slow_and_ends_with_the_ca(tmp_path: Path) -> None:
    ca, node = write_certificates(tmp_path, nodes=["a"], days=30, ca_days=20)
    now = datetime.now(UTC)
    assert node.until == ca.until
    assert now + timedelta(days=19) < certificate(tmp_path / "nodes/a").not_valid_after_utc < now + timedelta(days=21)
    assert certificate(tmp_path / "nodes/a").not_valid_before_utc < now - timedelta(hours=23)


def test_nothing_is_overwritten_without_being_asked_to(meerkat: Meerkat, folder: Path) -> None:
    before = contents(folder)
    meerkat("certs", folder, "--node", "c", "--node", "b").failed(2, "nodes/b", "already", "--renew")
    assert contents(folder) == before
    assert meerkat("certs", folder, "--node", "c").code == 0
    new = {path for path in contents(folder) if path not in before}
    assert {path for path in new if path.parent != folder / "ca/issued"} == set((folder / "nodes/c").iterdir())
    assert meerkat("certs", folder, "--node", "b", "--renew").code == 0
    changed = {path for path, data in before.items() if path.read_bytes() != data}
    assert changed == {folder / "nodes/b/cert.pem", folder / "nodes/b/key.pem"}


def test_the_command_says_what_it_made_and_until_when_it_holds(meerkat: Meerkat, tmp_path: Path) -> None:
    done = meerkat("certs", tmp_path / "pki", "--node", "a", "--days", 30)
    year = datetime.now(UTC) + timedelta(days=30)
    assert done.out.splitlines()[1] == f"{tmp_path}/pki/nodes/a: valid until {year:%Y-%m-%d}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["asks for no certificate", "--node"]),
        (["--node", "a/b"], ["--node", "'a/b'"]),
        (["--node", "a", "--node", SERVER_NAME], ["--node", repr(SERVER_NAME)]),
        (["--federation", "a b"], ["federation", "'a b'"]),
        (["--broker", "mqtt.example:8883"], ["--broker", "'mqtt.example:8883'", "neither"]),
        (["--node", "a", "--broker", "-x-"], ["--broker", "'-x-'"]),
    ],
)
def test_of_a_wrong_request_nothing_is_written(
    meerkat: Meerkat, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    meerkat("certs", tmp_path / "pki", *options).failed(2, *words)
    assert not (tmp_path / "pki").exists()


def test_a_folder_that_cannot_be_written_is_named(meerkat: Meerkat, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    meerkat("certs", tmp_path / "file", "--node", "a").failed(2, f"{tmp_path}/file/ca", "cannot be", "directory")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("key.pem", None, ["ca/key.pem", "cannot be read", "backup"]),
        ("cert.pem", None, ["ca/cert.pem", "cannot be read", "backup"]),
        ("cert.pem", b"junk", ["holds no CA in PEM format"]),
        ("key.pem", "nodes/a/key.pem", ["ca/key.pem", "not the key of cert.pem"]),
        ("crl.pem", None, ["ca/crl.pem", "cannot be read", "backup or the broker"]),
        ("crl.pem", b"junk", ["ca/crl.pem", "holds no list of revoked certificates", "backup or the broker"]),
    ],
)
def test_a_ca_that_is_damaged_is_left_alone(
    meerkat: Meerkat, folder: Path, name: str, data: bytes | str | None, words: list[str]
) -> None:
    if data is None:
        (folder / "ca" / name).unlink()
    else:
        (folder / "ca" / name).write_bytes(data if isinstance(data, bytes) else (folder / data).read_bytes())
    before = contents(folder)
    meerkat("certs", folder, "--node", "c").failed(2, *words)
    assert contents(folder) == before


def test_a_ca_that_has_expired_signs_no_more(meerkat: Meerkat, tmp_path: Path) -> None:
    Authority.create(tmp_path / "ca", days=0)
    meerkat("certs", tmp_path, "--node", "a").failed(2, "ca/cert.pem", "has expired on", "another folder")


def test_the_acl_is_written_once_and_keeps_what_was_added(meerkat: Meerkat, folder: Path) -> None:
    acl = folder / "broker/acl"
    assert acl.read_text() == mosquitto_acl("field")
    with acl.open("a") as file:
        file.write("\nuser a\ntopic deny #\n")
    assert meerkat("certs", folder, "--federation", "field", "--renew").code == 0
    assert acl.read_text().endswith("\nuser a\ntopic deny #\n")
    meerkat("certs", folder, "--federation", "other", "--renew").failed(2, str(acl), "'other'", "move it away")


# --- revocation ---


def revoked(folder: Path) -> set[int]:
    """What the broker is told, as anybody reads it."""
    listed = x509.load_pem_x509_crl((folder / "broker/crl.pem").read_bytes())
    authority = certificate(folder / "ca")
    assert listed.issuer == authority.subject
    assert listed.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
    return {entry.serial_number for entry in listed}


def test_a_list_of_nobody_is_there_from_the_start_and_never_older_than_the_ca(folder: Path) -> None:
    """A broker refuses everybody once its list has run out, so that must not come before the CA's own end."""
    assert revoked(folder) == set()
    listed = x509.load_pem_x509_crl((folder / "broker/crl.pem").read_bytes())
    assert listed.next_update_utc == certificate(folder / "ca").not_valid_after_utc
    assert listed.last_update_utc < datetime.now(UTC) - timedelta(hours=23)  # clocks differ


def test_all_that_a_node_was_ever_given_is_revoked_and_what_it_is_given_then_is_good(
    meerkat: Meerkat, folder: Path
) -> None:
    serials = {certificate(folder / "nodes/a").serial_number}
    assert meerkat("certs", folder, "--node", "a", "--renew").code == 0
    serials.add(certificate(folder / "nodes/a").serial_number)
    done = meerkat("certs", "revoke", folder, "a")
    assert done.code == 0
    assert "a: certificates revoked: 2" in done.out
    assert f"{folder}/broker/crl.pem" in done.out
    assert "restart" in done.out
    assert revoked(folder) == serials
    assert meerkat("certs", folder, "--node", "a", "--renew").code == 0
    assert certificate(folder / "nodes/a").serial_number not in revoked(folder)


def test_to_revoke_again_changes_nothing(meerkat: Meerkat, folder: Path) -> None:
    assert meerkat("certs", "revoke", folder, "a", "a").code == 0
    before = x509.load_pem_x509_crl((folder / "broker/crl.pem").read_bytes())
    done = meerkat("certs", "revoke", folder, "a")
    assert (done.code, "a: was revoked before" in done.out) == (0, True)
    after = x509.load_pem_x509_crl((folder / "broker/crl.pem").read_bytes())
    assert [(e.serial_number, e.revocation_date_utc) for e in after] == [
        (e.serial_number, e.revocation_date_utc) for e in before
    ]


def test_several_are_revoked_at_once_and_none_where_one_is_unknown(meerkat: Meerkat, folder: Path) -> None:
    meerkat("certs", "revoke", folder, "a", "nobody").failed(2, "'nobody'", "no certificate")
    assert revoked(folder) == set()
    assert meerkat("certs", "revoke", folder, "b", SERVER_NAME, OBSERVER_NAME).code == 0
    assert revoked(folder) == {certificate(folder / home).serial_number for home in ("nodes/b", "server", "observer")}


def test_a_node_called_broker_is_not_the_broker(meerkat: Meerkat, folder: Path) -> None:
    meerkat("certs", "revoke", folder, "broker").failed(2, "'broker'", "no certificate")
    assert meerkat("certs", folder, "--node", "broker").code == 0
    assert meerkat("certs", "revoke", folder, "broker").code == 0
    assert revoked(folder) == {certificate(folder / "nodes/broker").serial_number}


def test_a_folder_of_a_version_that_knew_no_revocation_gets_it(meerkat: Meerkat, folder: Path) -> None:
    for path in (folder / "ca/issued", folder / "ca/crl.pem", folder / "broker/crl.pem"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert meerkat("certs", folder, "--node", "c").code == 0
    assert revoked(folder) == set()
    assert meerkat("certs", "revoke", folder, "a", "c").code == 0
    assert revoked(folder) == {certificate(folder / f"nodes/{node}").serial_number for node in "ac"}


def test_the_brokers_copy_of_the_list_comes_back(meerkat: Meerkat, folder: Path) -> None:
    assert meerkat("certs", "revoke", folder, "a").code == 0
    shutil.rmtree(folder / "broker")
    assert meerkat("certs", folder, "--broker", "broker.example").code == 0
    assert revoked(folder) == {certificate(folder / "nodes/a").serial_number}


@pytest.mark.parametrize("names", [["no-such-folder", "a"], ["a", "pki"]])
def test_a_folder_without_a_ca_is_named(meerkat: Meerkat, tmp_path: Path, names: list[str]) -> None:
    meerkat("certs", "revoke", tmp_path / names[0], names[1]).failed(2, f"{tmp_path}/{names[0]}", "holds no CA")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_is_damaged_is_named_and_nothing_revoked(meerkat: Meerkat, folder: Path) -> None:
    damaged = next((folder / "ca/issued").iterdir())
    damaged.write_bytes(b"junk")
    meerkat("certs", "revoke", folder, "a").failed(2, str(damaged), "holds no certificate in PEM format")
    assert revoked(folder) == set()
