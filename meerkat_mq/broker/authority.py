"""The CA of a federation: what it signs, a copy of all that it signed, and what of it is revoked."""

import re
from collections.abc import Iterable, Iterator, Sequence
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

CA, CERTIFICATE, KEY, CRL = "ca.pem", "cert.pem", "key.pem", "crl.pem"
ISSUED = "issued"

_BACKUP = "put it back from a backup"
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
    """The CA of a federation; all keys are on the curve P-256.

    Attributes:
        folder: holds the CA, a copy of each certificate that it signed, and the list of those that are revoked (a CRL).
    """

    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, folder: Path, *, days: int) -> Self:
        """Make a CA that has revoked nothing, and write it.

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
        authority = cls(folder, certificate, key)
        authority._write_revoked(())
        _write_pair(folder, certificate, key)
        return authority

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a CA.

        Raises:
            ConfigError: it, or its list of revoked certificates, is not there or damaged, or it has expired.
        """
        certificate, key = _read_pair(folder)
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
            .add_extension(self._key_identifier(), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(map(alternative, hosts))), critical=False)
        certificate = builder.sign(self.key, SHA256())
        copy = self.folder / ISSUED / f"{certificate.serial_number:040x}.pem"
        write(copy, certificate.public_bytes(Encoding.PEM))  # first: none is handed out that could not be revoked
        write(folder / CA, self.certificate.public_bytes(Encoding.PEM))
        _write_pair(folder, certificate, key)
        return Issued(folder, until)

    def issued_to(self, common_name: str, *, place: Path) -> set[int]:
        """The serial numbers of all certificates that a client of this name was given, expired ones too.

        Args:
            common_name: its user name.
            place: the folder of its newest certificate, of which an older version kept no copy.

        Raises:
            ConfigError: a copy cannot be read.
        """
        paths = (*sorted((self.folder / ISSUED).glob("*.pem")), place / CERTIFICATE)
        certificates = [_read_certificate(path) for path in paths if path.exists()]
        wanted = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
        return {
            certificate.serial_number
            for certificate in certificates
            if list(certificate.subject) == wanted and _is_a_clients(certificate)
        }

    def revoked(self) -> dict[int, datetime]:
        """The serial numbers of revoked certificates, and when each was revoked.

        Raises:
            ConfigError: the list is not there, or is not this CA's.
        """
        path, remedy = self.folder / CRL, f"{_BACKUP} or the broker: without it, what was revoked is good again"
        with _reading(path, "list of revoked certificates", remedy):
            revoked = x509.load_pem_x509_crl(path.read_bytes())
        if not revoked.is_signature_valid(self.key.public_key()):
            raise ConfigError(str(path), "is not the list of this CA's revoked certificates", remedy)
        return {entry.serial_number: entry.revocation_date_utc for entry in revoked}

    def revoke(self, serials: Iterable[int]) -> None:
        """Put certificates on the list; those that are on it stay as they are.

        Raises:
            ConfigError: the list cannot be read or written.
        """
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
        write(self.folder / CRL, builder.sign(self.key, SHA256()).public_bytes(Encoding.PEM))

    def _key_identifier(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())


def _read_pair(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate = _read_certificate(folder / CERTIFICATE, "CA")
    with _reading(folder / KEY, "key"):
        key = load_pem_private_key((folder / KEY).read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(str(folder / KEY), f"is not the key of {CERTIFICATE}", _BACKUP)
    return certificate, key


def _read_certificate(path: Path, what: str = "certificate") -> x509.Certificate:
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


def _is_a_clients(certificate: x509.Certificate) -> bool:
    purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    return ExtendedKeyUsageOID.CLIENT_AUTH in purposes


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


def alternative(host: str) -> x509.GeneralName:
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
    write(folder / KEY, secret, secret=True)
    write(folder / CERTIFICATE, certificate.public_bytes(Encoding.PEM))


def write(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Write a file as a whole, and its folder; a secret one is its owner's alone from the first moment.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, secret=secret)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be written ({error.strerror})", "choose another folder") from error
