"""A federation's certificates: its CA, what the CA signs for broker, server and nodes, and Mosquitto's ACL."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meerkat_mq.core.files import write_atomically
from meerkat_mq.errors import ConfigError
from meerkat_mq.wire.topics import Topics, check_identifier

SERVER_NAME = "meerkat.server"  # its dot keeps it apart from every node id
CA, CERTIFICATE, KEY, ACL = "ca.pem", "cert.pem", "key.pem", "acl"

_SKEW = timedelta(days=1)  # clocks differ
_HOST = re.compile(r"(?=.{1,253}\Z)(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*\Z")
_KEY_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


@dataclass(frozen=True)
class Issued:
    """A certificate that was written.

    Attributes:
        folder: with all its files.
        until: the end of its validity.
    """

    folder: Path
    until: datetime


@dataclass(frozen=True)
class Authority:
    """The CA of a federation, in a folder; all keys are on the curve P-256."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, folder: Path, *, days: int) -> Self:
        """Make a CA and write it.

        Raises:
            ConfigError: the folder cannot be written.
        """
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        builder = _builder("Meerkat-MQ CA", key.public_key(), now - _SKEW, now + timedelta(days=days))
        certificate = (
            builder.issuer_name(_name("Meerkat-MQ CA"))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
            .sign(key, SHA256())
        )
        _write_pair(folder, certificate, key)
        return cls(certificate, key)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a CA.

        Raises:
            ConfigError: it is not there, damaged, or has expired.
        """
        try:
            certificate = x509.load_pem_x509_certificate((folder / CERTIFICATE).read_bytes())
            key = load_pem_private_key((folder / KEY).read_bytes(), password=None)
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
            raise ConfigError(str(error.filename), problem, "put it back from a backup") from error
        except (ValueError, TypeError) as error:
            raise ConfigError(str(folder), "holds no CA in PEM format", "put it back from a backup") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigError(str(folder / KEY), f"is not the key of {CERTIFICATE}", "put it back from a backup")
        if certificate.not_valid_after_utc <= datetime.now(UTC):
            problem = f"has expired on {certificate.not_valid_after_utc:%Y-%m-%d}"
            raise ConfigError(str(folder / CERTIFICATE), problem, "make all certificates anew in another folder")
        return cls(certificate, key)

    def issue(
        self, folder: Path, common_name: str, *, days: int, hosts: Sequence[str] = (), now: datetime | None = None
    ) -> Issued:
        """Write a certificate, its key and the CA's certificate; what the folder held is replaced.

        Args:
            folder: of their own.
            common_name: the user that a broker sees.
            days: of validity; it ends with the CA's at the latest.
            hosts: names and addresses, for a broker; without them it is a client's.
            now: the time to count days from; default: the clock's.

        Raises:
            ConfigError: a host is none, or the folder cannot be written.
        """
        now = now or datetime.now(UTC)
        until = min(now + timedelta(days=days), self.certificate.not_valid_after_utc)
        key = ec.generate_private_key(ec.SECP256R1())
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            _builder(common_name, key.public_key(), now - _SKEW, until)
            .issuer_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage("digital_signature"), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_alternative, hosts))), critical=False)
        _write(folder / CA, self.certificate.public_bytes(Encoding.PEM), secret=False)
        _write_pair(folder, builder.sign(self.key, SHA256()), key)
        return Issued(folder, until)


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

    `ca/` holds the CA, `broker/` the broker's certificate and Mosquitto's ACL, `server/` the server's certificate,
    `nodes/<id>/` a node's, with its id as common name.

    Args:
        folder: may exist.
        federation: makes the server's certificate and the ACL.
        hosts: makes the broker's certificate, for these names and addresses.
        nodes: ids to make a certificate for.
        days: validity of certificates.
        ca_days: validity of a new CA.
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
            problem = f"is not the ACL of the federation {federation!r}"
            raise ConfigError(str(acl_file), problem, "move it away, or name its own federation")
        wanted.append((folder / "server", SERVER_NAME, ()))
    if hosts:
        for host in hosts:
            _alternative(host)
        wanted.append((folder / "broker", "broker", hosts))
    wanted += [(folder / "nodes" / check_identifier(node, "--node"), node, ()) for node in dict.fromkeys(nodes)]
    for place, _, _ in wanted:
        if (place / CERTIFICATE).exists() and not renew:
            raise ConfigError(str(place), "holds a certificate already", "add --renew to replace it")
    if any((folder / "ca" / name).exists() for name in (CERTIFICATE, KEY)):
        authority = Authority.load(folder / "ca")
    else:
        authority = Authority.create(folder / "ca", days=ca_days)
        yield Issued(folder / "ca", authority.certificate.not_valid_after_utc)
    if federation is not None and not acl_file.exists():
        _write(acl_file, acl.encode(), secret=False)
    for place, name, alternatives in wanted:
        yield authority.issue(place, name, days=days, hosts=alternatives)


def mosquitto_acl(federation: str) -> str:
    """Mosquitto's ACL for a federation; its users are the node ids, and the server.

    Raises:
        ConfigError: the federation's name is not legal.
    """
    topics = Topics(federation)
    common = (topics.server, topics.run, topics.round, topics.values, f"{topics.root}/blob/#")
    lines = [
        f"# Federation {federation}: a node has everything below its own up/, reads its own down/ and what is common.",
        f"pattern readwrite {topics.root}/up/%u/#",
        f"pattern read {topics.root}/down/%u/#",
        *(f"pattern read {topic}" for topic in common),
        "",
        f"user {SERVER_NAME}",
        f"topic readwrite {topics.root}/#",
    ]
    return "\n".join(lines) + "\n"


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    common_name: str, key: ec.EllipticCurvePublicKey, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    """What all certificates have; the issuer and its extensions are to be added."""
    return (
        x509.CertificateBuilder()
        .subject_name(_name(common_name))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*granted: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in granted for usage in _KEY_USAGES})


def _alternative(host: str) -> x509.GeneralName:
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
    _write(folder / CERTIFICATE, certificate.public_bytes(Encoding.PEM), secret=False)


def _write(path: Path, data: bytes, *, secret: bool) -> None:
    """Write a file as a whole; a secret one is its owner's alone from the first moment."""
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, secret=secret)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(str(path), f"cannot be written ({error.strerror})", "choose another folder") from error
