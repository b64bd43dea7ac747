"""What a ledger tells besides entries and updates."""

from dataclasses import dataclass

from meerkat_mq.core.path import Entry

Products = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Term:
    """A term that a server took; `taken` in seconds since 1970."""

    term: int
    server_id: str
    host: str
    taken: float


@dataclass(frozen=True, slots=True)
class Closed:
    """An entry and how its round closed; `closed` in seconds since 1970."""

    entry: Entry
    term: int
    closed: float
    asked: int
    overdue: bool


@dataclass(frozen=True, slots=True)
class KeptSnapshot:
    """A snapshot: theta's version, the blob's hash and size."""

    version: int
    hash: bytes
    size: int


@dataclass(frozen=True, slots=True)
class NodeRow:
    """What is known of a node that has a slot.

    Attributes:
        slot_version: theta's version when it got its slot.
        status: the last word of its status topic; None before the first sighting.
        first_seen: seconds since 1970.
        updates: update messages that came from it, duplicates too.
        packet_bytes: all MQTT packets that came from it.
    """

    node: str
    slot: int
    slot_version: int
    boot: int | None
    host: str | None
    status: str | None
    rows: int | None
    first_seen: float | None
    last_seen: float | None
    updates: int
    packet_bytes: int


@dataclass(frozen=True, slots=True)
class Sighting:
    """News of a node; `updates` and `packet_bytes` count what came since the last sighting."""

    node: str
    boot: int
    host: str
    status: str
    rows: int
    seen: float
    updates: int = 0
    packet_bytes: int = 0
