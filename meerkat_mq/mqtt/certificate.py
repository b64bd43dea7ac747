"""What is wrong with our own client certificate, as far as its holder can see."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from meerkat_mq.config import BrokerConfig

if TYPE_CHECKING:
    from cryptography.x509 import Certificate


def certificate_flaws(broker: BrokerConfig, name: str | None) -> tuple[str, ...]:
    """Why a broker may not take our client certificate, or takes us for somebody else. Blocks: reads a file.

    Args:
        name: the user that the federation's rights are given to: a node's id; None where nobody knows.
    """
    certificate = None if broker.cert_file is None else _read(broker.cert_file)
    return () if broker.cert_file is None or certificate is None else _flaws(certificate, broker.cert_file, name)


def user_flaws(broker: BrokerConfig, name: str | None) -> tuple[str, ...]:
    """Why a broker with rights by user name may take us for somebody else."""
    is_other = name is not None and broker.username not in (None, name)
    return (f"broker.username is {broker.username!r}, and this is {name!r}",) if is_other else ()


def _flaws(certificate: "Certificate", file: Path, name: str | None) -> tuple[str, ...]:
    flaws, holder, now = list[str](), _common_name(certificate), datetime.now(UTC)
    if name is not None and holder != name:
        flaws.append(f"{file} is the certificate of {holder!r}, and this is {name!r}")
    if certificate.not_valid_after_utc < now:
        flaws.append(f"{file} has expired on {certificate.not_valid_after_utc:%Y-%m-%d}")
    if certificate.not_valid_before_utc > now:
        flaws.append(f"{file} is valid from {certificate.not_valid_before_utc:%Y-%m-%d} on, by the clock here")
    if not _is_for_clients(certificate):
        flaws.append(f"{file} is a certificate for brokers, not for clients")
    return tuple(flaws)


def _read(file: Path) -> "Certificate | None":
    from cryptography import x509  # noqa: PLC0415 - not everybody has a certificate

    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError):  # the TLS library says that better
        return None


def _common_name(certificate: "Certificate") -> str:
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def _is_for_clients(certificate: "Certificate") -> bool:
    from cryptography.x509 import ExtendedKeyUsage, ExtensionNotFound  # noqa: PLC0415
    from cryptography.x509.oid import ExtendedKeyUsageOID as Usage  # noqa: PLC0415

    try:
        usages = certificate.extensions.get_extension_for_class(ExtendedKeyUsage).value
    except (ExtensionNotFound, ValueError):
        return True
    return Usage.CLIENT_AUTH in usages or Usage.ANY_EXTENDED_KEY_USAGE in usages
