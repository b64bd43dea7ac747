"""A federation's folder of certificates: its CA, what that signed or revoked, and Mosquitto's ACL.

The CA keeps a copy of each certificate that it signs, since only what is known can be revoked, and the list of those
that are revoked (a CRL), of which the broker has a copy. All keys are on the curve P-256.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meerkat_mq.core.files import write_atomically, writing
from meerkat_mq.errors import ConfigError
from meerkat_mq.wire.topics import OBSERVER_NAME, SERVER_NAME, Topics, check_identifier

CA, CERTIFICATE, KEY, CRL = "ca.pem", "cert.pem", "key.pem", "crl.pem"
ACL, ISSUED, NODES = "acl", "issued", "nodes"

_HOMES = {SERVER_NAME: "server", OBSERVER_NAME: "observer"}
_BACKUP = "put it back from a backup"
_SKEW = timedelta(days=1)  # clocks differ
_HOST = re.compile(r"(?=.{1,253}\Z)(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*\Z")
_KEY_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


class Issued(NamedTuple):
    """A certificate that was written, with all its files in a folder, and the end of its validity."""

    folder: Path
    until: datetime


@dataclass(frozen=True)
class Authority:
    """The CA of a federation, and the folder that holds it, the copies and the list."""

    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, folder: Path, *, days: int) -> Self:
        """Make a CA that has revoked nothing, and write it, or raise ConfigError."""
        key, now, name = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC), _name("Meerkat-MQ CA")
        builder = _builder(name, key, now, now + timedelta(days=days), "key_cert_sign", "crl_sign")
        certificate = (
            builder.issuer_name(name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, SHA256())
        )
        authority = cls(folder, certificate, key)
        authority._write_revoked(())
        _write_pair(folder, certificate, key)
        return authority

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a CA; ConfigError where it, or its list, is not there or damaged, or where it has expired."""
        certificate = read_certificate(folder / CERTIFICATE, "CA")
        with _reading(folder / KEY, "key"):
            key = load_pem_private_key((folder / KEY).read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigError(str(folder / KEY), f"is not the key of {CERTIFICATE}", _BACKUP)
        if certificate.not_valid_after_utc <= datetime.now(UTC):
            problem = f"has expired on {certificate.not_valid_after_utc:%Y-%m-%d}"
            raise ConfigError(str(folder / CERTIFICATE), problem, "make all certificates anew in another folder")
        authority = cls(folder, certificate, key)
        if not (folder / CRL).exists() and not (folder / ISSUED).exists():
            authority._write_revoked(())  # a CA of a version that knew no revocation
        authority.revoked()
        return authority

    def issue(
        self, folder: Path, common_name: str, *, days: int, hosts: Sequence[str] = (), now: datetime | None = None
    ) -> Issued:
        """Write a certificate, its key and the CA's certificate; what the folder held is replaced.

        Args:
            folder: of their own.
            common_name: the user that a broker sees.
            days: of validity, from `now` on; it ends with the CA's at the latest.
            hosts: names and addresses, for a broker; without them it is a client's.

        Raises:
            ConfigError: a host is none, or the folder cannot be written.
        """
        now = now or datetime.now(UTC)
        until = min(now + timedelta(days=days), self.certificate.not_valid_after_utc)
        key = ec.generate_private_key(ec.SECP256R1())
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            _builder(_name(common_name), key, now, until, "digital_signature")
            .issuer_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(self._key_identifier(), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_alternative, hosts))), critical=False)
        certificate = builder.sign(self.key, SHA256())
        copy = self.folder / ISSUED / f"{certificate.serial_number:040x}.pem"
        _write(copy, certificate.public_bytes(Encoding.PEM))  # first: none is handed out that could not be revoked
        _write(folder / CA, self.certificate.public_bytes(Encoding.PEM))
        _write_pair(folder, certificate, key)
        return Issued(folder, until)

    def issued_to(self, common_name: str, *, place: Path) -> set[int]:
        """The serial numbers of all certificates that a client of this name was given, expired ones too.

        In `place` is its newest one, of which an older version kept no copy. ConfigError where one cannot be read.
        """
        paths = (*sorted((self.folder / ISSUED).glob("*.pem")), place / CERTIFICATE)
        certificates = [read_certificate(path) for path in paths if path.exists()]
        return {
            certificate.serial_number
            for certificate in certificates
            if certificate.subject == _name(common_name)
            and ExtendedKeyUsageOID.CLIENT_AUTH
            in certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        }

    def revoked(self) -> dict[int, datetime]:
        """When each revoked certificate was revoked, by serial number; ConfigError where that list is not this CA's."""
        path, remedy = self.folder / CRL, f"{_BACKUP} or the broker: without it, what was revoked is good again"
        with _reading(path, "list of revoked certificates", remedy):
            revoked = x509.load_pem_x509_crl(path.read_bytes())
        if not revoked.is_signature_valid(self.key.public_key()):
            raise ConfigError(str(path), "is not the list of this CA's revoked certificates", remedy)
        return {entry.serial_number: entry.revocation_date_utc for entry in revoked}

    def revoke(self, serials: Iterable[int]) -> None:
        """Put certificates on the list, or raise ConfigError; those that are on it stay as they are."""
        before, now = self.revoked(), datetime.now(UTC)
        self._write_revoked((before | {serial: now for serial in serials if serial not in before}).items())

    def _write_revoked(self, revoked: Iterable[tuple[int, datetime]]) -> None:
        """Sign the list. It is good as long as the CA: a broker refuses *everybody* once its list has run out."""
        now, end = datetime.now(UTC), self.certificate.not_valid_after_utc
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(min(now, end) - _SKEW)
            .next_update(end)
            .add_extension(self._key_identifier(), critical=False)
            .add_extension(x509.CRLNumber(int(now.timestamp() * 1000)), critical=False)
        )
        for serial, date in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(date).build()
            builder = builder.add_revoked_certificate(entry)
        _write(self.folder / CRL, builder.sign(self.key, SHA256()).public_bytes(Encoding.PEM))

    def _key_identifier(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())


def read_certificate(path: Path, what: str = "certificate") -> x509.Certificate:
    """Read one; ConfigError where the file is missing, or holds none."""
    with _reading(path, what):
        return x509.load_pem_x509_certificate(path.read_bytes())


@contextmanager
def _reading(path: Path, what: str, remedy: str = _BACKUP) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read ({error.strerror})", remedy) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(str(path), f"holds no {what} in PEM format", remedy) from error


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, end: datetime, *usages: str
) -> x509.CertificateBuilder:
    """What all certificates have; the issuer and its extensions are to be added."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.KeyUsage(**{usage: usage in usages for usage in _KEY_USAGES}), critical=True)
    )


def _alternative(host: str) -> x509.GeneralName:
    """A host name or address, as a certificate holds it; ConfigError where it is neither."""
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        if not _HOST.match(host):
            problem = f"{host!r} is neither a host name nor an address"
            raise ConfigError("--broker", problem, "give it as nodes write it in broker.url, without a port") from None
        return x509.DNSName(host)


def _write_pair(folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    """The certificate comes last: where there is one, everything is there."""
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _write(folder / KEY, secret, secret=True)
    _write(folder / CERTIFICATE, certificate.public_bytes(Encoding.PEM))


def _write(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Write a file, and its folder; a secret one is its owner's alone."""
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, secret=secret)


def write_certificates(
    folder: Path,
    *,
    federation: str | None = None,
    hosts: Sequence[str] = (),
    nodes: Sequence[str] = (),
    days: int = 397,
    ca_days: int = 3650,
    renew: bool = False,
) -> Iterator[Issued]:
    """Write what is asked for below a folder, with a new CA where it has none; gives each certificate as it is written.

    `ca/` holds the CA, `broker/` the broker's certificate, Mosquitto's ACL and the list of revoked certificates,
    `server/` the server's certificate, `observer/` one for people who look, `nodes/<id>/` a node's, with its id as
    common name.

    Args:
        federation: makes the certificates of server and observer, and the ACL.
        hosts: makes the broker's certificate, for these names and addresses.
        nodes: ids to make a certificate for.
        days: validity of certificates; `ca_days`: of a new CA.
        renew: replace certificates that are there; never the CA, never the ACL.

    Raises:
        ConfigError: a name is not legal, a certificate is there already, or a file cannot be read or written; nothing
            was written then, unless the disk failed.
    """
    wanted: list[tuple[Path, str, Sequence[str]]] = []
    acl_file = folder / "broker" / ACL
    if federation is not None:
        acl = mosquitto_acl(federation)
        if acl_file.exists() and not acl_file.read_text(encoding="utf-8", errors="replace").startswith(acl):
            problem = f"is not the ACL that this version writes for the federation {federation!r}"
            raise ConfigError(str(acl_file), problem, "name the federation of this folder, or move it away")
        wanted += [(folder / home, name, ()) for name, home in _HOMES.items()]
    if hosts:
        for host in hosts:
            _alternative(host)
        wanted.append((folder / "broker", "broker", hosts))
    wanted += [(folder / NODES / check_identifier(node, "--node"), node, ()) for node in dict.fromkeys(nodes)]
    for place, _, _ in wanted:
        if (place / CERTIFICATE).exists() and not renew:
            raise ConfigError(str(place), "holds a certificate already", "add --renew to replace it")
    if any((folder / "ca" / name).exists() for name in (CERTIFICATE, KEY)):
        authority = Authority.load(folder / "ca")
    else:
        authority = Authority.create(folder / "ca", days=ca_days)
        yield Issued(folder / "ca", authority.certificate.not_valid_after_utc)
    if federation is not None and not acl_file.exists():
        _write(acl_file, acl.encode())
    if federation is not None or hosts or (folder / "broker").is_dir():
        _hand_over_the_list(folder)
    for place, name, alternatives in wanted:
        yield authority.issue(place, name, days=days, hosts=alternatives)


def authority_of(folder: Path) -> Authority:
    """The CA of a folder that was made before; ConfigError where there is none."""
    if not (folder / "ca").is_dir():
        raise ConfigError(str(folder), "holds no CA", "give the folder that meerkat certs made, and then the ids")
    return Authority.load(folder / "ca")


def home_of(folder: Path, name: str) -> Path:
    """Where the certificate is that a client of this name was given: a node, the server or the observer.

    ConfigError where no client can have that name.
    """
    return folder / (_HOMES.get(name) or f"{NODES}/{check_identifier(name, 'ID')}")


def revoke_certificates(folder: Path, names: Sequence[str]) -> dict[str, int]:
    """Revoke all certificates that nodes, the server or the observer were given; the broker's copy of the list follows.

    Returns:
        For each name, how many of its certificates were not revoked before.

    Raises:
        ConfigError: a name was given no certificate, or a file cannot be read or written; then nothing
            was revoked, unless the disk failed.
    """
    authority = authority_of(folder)
    issued = {name: authority.issued_to(name, place=home_of(folder, name)) for name in names}
    for name, serials in issued.items():
        if not serials:
            raise ConfigError("ID", f"{name!r} was given no certificate by {folder / 'ca'}", "check FOLDER and ID")
    before = authority.revoked().keys()
    authority.revoke(serial for serials in issued.values() for serial in sorted(serials))
    _hand_over_the_list(folder)
    return {name: len(serials - before) for name, serials in issued.items()}


def _hand_over_the_list(folder: Path) -> None:
    """Give the broker the CA's list of revoked certificates."""
    _write(folder / "broker" / CRL, (folder / "ca" / CRL).read_bytes())


def mosquitto_acl(federation: str) -> str:
    """Mosquitto's ACL for a federation, or ConfigError; its users are the node ids, and the server."""
    topics = Topics(federation)
    common = (topics.server, topics.run, topics.round, topics.values, f"{topics.root}/blob/#")
    own = f"{topics.root}/up/%u"
    lines = [
        f"# Federation {federation}: a node writes three topics, and reads its status, its answers and what is common.",
        f"pattern readwrite {own}/status",
        f"pattern write {own}/update",
        f"pattern write {own}/want",
        f"pattern read {topics.root}/down/%u/#",
        *(f"pattern read {topic}" for topic in common),
        "",
        f"user {SERVER_NAME}",
        f"topic readwrite {topics.root}/#",
        "",
        f"user {OBSERVER_NAME}",
        f"topic read {topics.root}/#",
    ]
    return "\n".join(lines) + "\n"
