"""When the certificates on the way to the broker expire. A service says it a month before, as long as it is connected.

A client certificate that has expired keeps its holder out at the next connection, perhaps months later; the broker's or
the CA's keeps everybody out at once. So somebody has to know early: the log says it once a day, and a file in the state
folder tells `meerkat status`, which reads no configuration.
"""

import asyncio
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple

from meerkat_mq.config import BrokerConfig
from meerkat_mq.core.files import write_atomically
from meerkat_mq.core.foreign import parse_json

CERTIFICATES_FILE: Final = "certificates.json"
SOON: Final = timedelta(days=30)
_CLIENT, _CA, _BROKER = "client certificate", "CA", "certificate of the broker"
_RENEW = "make a new one with meerkat certs renew, and put it in its place"
_REMEDY = {_CA: "make a new CA and all certificates with meerkat certs, in another folder"}
_LOOK_EVERY_S = 3600.0
_LOOKS_A_LINE = 24


class Expiry(NamedTuple):
    """A certificate, where it is, and the end of its validity."""

    what: str
    place: str
    until: datetime

    def warning(self, now: datetime | None = None) -> str:
        """What to say of it, with a remedy; "" as long as it is good for another month."""
        left = self.until - (now or datetime.now(UTC))
        if left > SOON:
            return ""
        days = f"{left.days} day{'s' * (left.days != 1)}"
        when = "has expired" if left < timedelta() else f"expires in {days},"
        return f"the {self.what} {self.place} {when} on {self.until:%Y-%m-%d}: {_REMEDY.get(self.what, _RENEW)}"


def expiries(broker: BrokerConfig, broker_until: datetime | None = None) -> tuple[Expiry, ...]:
    """Of the client's certificate, the CA's, and the broker's, where that is known. Blocks: reads files.

    A file that cannot be read is left out: a connection says that better. Of several CAs the last one to expire counts.
    """
    found = []
    if broker.cert_file is not None and (ends := _ends(broker.cert_file)):
        found.append(Expiry(_CLIENT, str(broker.cert_file), ends[0]))
    if broker.ca_file is not None and (ends := _ends(broker.ca_file)):
        found.append(Expiry(_CA, str(broker.ca_file), max(ends)))
    if broker_until is not None:
        found.append(Expiry(_BROKER, broker.address, broker_until))
    return tuple(found)


def _ends(file: Path) -> list[datetime]:
    from cryptography import x509  # noqa: PLC0415 - slow to import, and not everybody has a certificate

    try:
        return [one.not_valid_after_utc for one in x509.load_pem_x509_certificates(file.read_bytes())]
    except (OSError, ValueError, x509.InvalidVersion):
        return []


async def watch_expiry(
    broker: BrokerConfig, broker_until: datetime | None, folder: Path | None, say: Callable[..., object]
) -> None:
    """As long as a connection lasts: look once an hour, `say` what expires soon once a day, and keep it in `folder`."""
    for looks in count():
        found = await asyncio.to_thread(expiries, broker, broker_until)
        if folder is not None:
            await asyncio.to_thread(keep, folder, found)
        if looks % _LOOKS_A_LINE == 0:
            for expiry in found:
                if words := expiry.warning():
                    say("certificate expires", expiry.what, problem=words)
        await asyncio.sleep(_LOOK_EVERY_S)


def keep(folder: Path, found: Iterable[Expiry]) -> None:
    """Leave in a state folder what `kept` reads there; a disk that does not take it now is asked again in an hour."""
    table = [{"what": one.what, "place": one.place, "until": one.until.isoformat()} for one in found]
    file, data = folder / CERTIFICATES_FILE, json.dumps(table).encode() + b"\n"
    with suppress(OSError):
        if (file.read_bytes() if file.exists() else b"[]\n") != data:
            write_atomically(file, data, durable=False)


def kept(folder: Path) -> tuple[Expiry, ...]:
    """What a service found when it was last connected; nothing where there is no such file, or it is damaged."""
    try:
        table = parse_json((folder / CERTIFICATES_FILE).read_bytes())
        return tuple(
            Expiry(str(one["what"]), str(one["place"]), datetime.fromisoformat(one["until"]).astimezone(UTC))
            for one in table
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return ()
