"""What frames mean: one frozen class a type. Their bytes are made and read in `frames`."""

from dataclasses import dataclass, field
from enum import IntEnum

from meerkat_mq.core.path import Entry


@dataclass(frozen=True, slots=True)
class Header:
    """What every frame says of its run.

    Attributes:
        run: first 4 bytes of the run id, as u32.
        term: the server's term.
        version: version of theta that the sender stands at.
        mask: first 8 bytes of the mask hash.
    """

    run: int
    term: int
    version: int
    mask: bytes

    @classmethod
    def of(cls, run_id: bytes, term: int, version: int, mask_hash: bytes) -> "Header":
        """The header of a run's frames."""
        return cls(int.from_bytes(run_id[:4], "little"), term, version, mask_hash[:8])


@dataclass(frozen=True, slots=True)
class Update:
    """A node's projected gradients for the round of version `header.version`.

    Attributes:
        boot: the sending process.
        base: first 8 bytes of the node's own digest of the newest theta at or before that version whose digest is due.
        loss: mean loss of the steps.
        scalars: one projected gradient a local step, each exactly a float32; hostile ones may be NaN or infinite.
        seeds: the explicit seed list, one a step; None where both sides derive it.
    """

    header: Header
    boot: int
    base: bytes
    loss: float
    scalars: tuple[float, ...]
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """The state of the round; retained.

    Attributes:
        is_open: whether nodes are asked to step now, from theta of `header.version`.
        steps: T.
        lanes: P.
        eps: perturbation scale, exactly a float32.
        deadline_ms: from opening to closing.
        attempt: counts doublings of the deadline and reopenings.
        asked: slots of the nodes asked.
        heard: slots whose updates are committed: the acknowledgement.
        short: (slot, local steps) of nodes that do fewer than T, by slot.
        entries: the newest ledger entries, oldest first.
    """

    header: Header
    is_open: bool
    steps: int
    lanes: int
    eps: float
    deadline_ms: int
    attempt: int = 0
    asked: frozenset[int] = frozenset()
    heard: frozenset[int] = frozenset()
    short: tuple[tuple[int, int], ...] = ()
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True, slots=True)
class Want:
    """What a node asks of the server.

    Attributes:
        welcome: asks for its slot.
        entries_from: first ledger entry wanted.
        blob: hash of a blob of which `chunks` are wanted.
    """

    header: Header
    boot: int
    welcome: bool = False
    entries_from: int | None = None
    blob: bytes | None = None
    chunks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Welcome:
    """The server's answer to a node's birth: its slot."""

    header: Header
    boot: int
    slot: int


@dataclass(frozen=True, slots=True)
class Entries:
    """Ledger entries, in order."""

    header: Header
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part `index` of `count` of a blob of `size` bytes."""

    header: Header
    blob: bytes
    index: int
    count: int
    size: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Offer:
    """Instead of entries: a snapshot of theta of `version`, to be asked for chunk by chunk.

    Attributes:
        blob: hash of the snapshot blob.
        size: its bytes.
    """

    header: Header
    version: int
    blob: bytes
    size: int


def in_words(member: IntEnum) -> str:
    """An enumeration's member as people read it: "out of range"."""
    return member.name.lower().replace("_", " ")


class Reason(IntEnum):
    """Why an update was refused."""

    RESYNCHRONISE = 1  # its base digest is not that of the server's theta
    WRONG_SEEDS = 2
    WRONG_STEPS = 3
    OUT_OF_RANGE = 4  # a projected gradient or the loss is not finite, or too large to apply


@dataclass(frozen=True, slots=True)
class Refusal:
    """The server refuses the update for `header.version` of process `boot`."""

    header: Header
    boot: int
    reason: Reason


Frame = Update | Round | Want | Welcome | Entries | Offer | Chunk | Refusal
