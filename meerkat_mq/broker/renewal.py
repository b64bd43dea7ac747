"""`meerkat certs renew`: certificates of a folder that expire soon are made anew, before anybody is kept out.

The old certificate stays valid to its end, so the new one can be carried to its device at any time before that. What
was revoked is not renewed by the way: its holder would be let in again.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509

from meerkat_mq.broker.certs import CERTIFICATE, NODES, Authority, Issued, authority_of, home_of, read_certificate
from meerkat_mq.errors import ConfigError
from meerkat_mq.wire.topics import OBSERVER_NAME, SERVER_NAME

_BROKER = "broker"


class Kept(NamedTuple):
    """A certificate that was not renewed although it expires soon, and why."""

    folder: Path
    why: str


def renew_certificates(
    folder: Path, names: Sequence[str] = (), *, within: timedelta = timedelta(days=30), days: int = 397
) -> Iterator[Issued | Kept]:
    """Make new certificates and keys in the place of those that expire soon; gives each as it is written.

    Args:
        folder: that `write_certificates` made.
        names: node ids, or the names of server and observer: these alone, whenever they expire, revoked or not.
        within: what is soon, without names; then the broker's is renewed too, with the names that it has.
        days: validity of the new ones.

    Raises:
        ConfigError: a name has no certificate in the folder, or a file cannot be read or written; then nothing was
            renewed, unless the disk failed.
    """
    authority = authority_of(folder)
    places = [home_of(folder, name) for name in dict.fromkeys(names)] or _places(folder)
    for name, place in zip(names, places, strict=False):
        if not (place / CERTIFICATE).exists():
            raise ConfigError("ID", f"{name!r} has no certificate in {folder}", "check FOLDER and ID")
    held = {place: read_certificate(place / CERTIFICATE) for place in places}
    revoked = authority.revoked()
    soon = datetime.now(UTC) + within
    if (end := authority.certificate.not_valid_after_utc) <= soon:
        yield Kept(folder / "ca", f"expires on {end:%Y-%m-%d}: make all certificates anew in another folder")
    for place, certificate in held.items():
        if not names and certificate.not_valid_after_utc > soon:
            continue
        if not names and certificate.serial_number in revoked:
            yield Kept(place, "was revoked; name its ID to let it in again")
        elif certificate.not_valid_after_utc >= end:
            yield Kept(place, f"expires with its CA, on {end:%Y-%m-%d}")
        else:
            yield _renewed(authority, place, certificate, days)


def _places(folder: Path) -> list[Path]:
    """Every folder of a certificate, the broker's first: without it nobody can connect."""
    homes = [folder / _BROKER, *(home_of(folder, name) for name in (SERVER_NAME, OBSERVER_NAME))]
    return [place for place in (*homes, *sorted((folder / NODES).glob("*"))) if (place / CERTIFICATE).exists()]


def _renewed(authority: Authority, place: Path, old: x509.Certificate, days: int) -> Issued:
    """The same names, another key."""
    try:
        names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    hosts = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    (holder,) = old.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return authority.issue(place, str(holder.value), days=days, hosts=hosts)
