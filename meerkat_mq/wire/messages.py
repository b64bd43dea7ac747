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
class Values:
    """A displacement that a node has for the server, which asks for it chunk by chunk.

    Attributes:
        blob: hash of the encoded displacement, 16 bytes; `size` is the blob's.
        steps: local steps that led to it.
    """

    blob: bytes
    size: int
    steps: int


@dataclass(frozen=True, slots=True)
class Update:
    """A node's projected gradients, or its displacement, from theta of version `header.version`.

    Attributes:
        boot: the sending process.
        base: first 8 bytes of the node's own digest of the newest theta at or before that version whose digest is due.
        loss: mean loss of the steps.
        scalars: one projected gradient a direction, each exactly a float32; hostile ones may be NaN or infinite; ()
            with `values`. Fewer than the round's in a buffered run: a partial path.
        seeds: the explicit seed list, one a scalar; None where both sides derive it.
        values: the displacement of a values node.
    """

    header: Header
    boot: int
    base: bytes
    loss: float
    scalars: tuple[float, ...]
    seeds: tuple[int, ...] | None = None
    values: Values | None = None


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
        heard: slots whose updates from theta of this version are committed: the acknowledgement.
        heard_before: (slot, age) of nodes whose newest committed update is from theta of version − age, by slot; only
            ages up to the run's max_staleness, and not of slots in `heard`.
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
    heard_before: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Want:
    """What a node asks of the server; of a node, the server asks only for chunks of a displacement.

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
    """Instead of entries: a snapshot of theta of `version`, to be asked for chunk by chunk: hash and bytes of it."""

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
    NO_VALUES = 5  # this run takes projected gradients only


@dataclass(frozen=True, slots=True)
class Refusal:
    """The server refuses the update for `header.version` of process `boot`."""

    header: Header
    boot: int
    reason: Reason


Frame = Update | Round | Want | Welcome | Entries | Offer | Chunk | Refusal
