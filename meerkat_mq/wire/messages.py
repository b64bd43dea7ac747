"""What frames mean: one frozen class a type. Their bytes are made and read in `frames`."""

from dataclasses import dataclass, field
from enum import IntEnum

from meerkat_mq.core.path import Entry


@dataclass(frozen=True, slots=True)
class Header:
    """What every frame says of its run."""

    run: int  # first 4 bytes of the run id, as u32
    term: int  # the server's term
    version: int  # version of theta that the sender stands at
    mask: bytes  # first 8 bytes of the mask hash

    @classmethod
    def of(cls, run_id: bytes, term: int, version: int, mask_hash: bytes) -> "Header":
        """The header of a run's frames."""
        return cls(int.from_bytes(run_id[:4], "little"), term, version, mask_hash[:8])


@dataclass(frozen=True, slots=True)
class Values:
    """A displacement that a node has for the server, which asks for it chunk by chunk."""

    blob: bytes  # hash of the encoded displacement, 16 bytes; `size` is the blob's
    size: int
    steps: int  # local steps that led to it


@dataclass(frozen=True, slots=True)
class Update:
    """A node's projected gradients, or its displacement, from theta of version `header.version`.

    `scalars`: one projected gradient a direction, each exactly a float32; hostile ones may be NaN or infinite; ()
    with `values`. Fewer than the round's in a buffered run: a partial path.
    """

    header: Header
    boot: int  # the sending process
    base: bytes  # first 8 bytes of its digest of the newest theta, at or before that version, that one is due of
    loss: float  # mean loss of the steps
    scalars: tuple[float, ...]
    seeds: tuple[int, ...] | None = None  # the explicit seed list, one a scalar; None where both sides derive it
    values: Values | None = None  # the displacement of a values node


@dataclass(frozen=True, slots=True)
class Round:
    """The state of the round; retained.

    `heard_before`: (slot, age) of nodes whose newest committed update is from theta of version − age, by slot; only
    ages up to the run's max_staleness, and not of slots in `heard`.
    """

    header: Header
    is_open: bool  # whether nodes are asked to step now, from theta of `header.version`
    steps: int  # T
    lanes: int  # P
    eps: float  # perturbation scale, exactly a float32
    deadline_ms: int  # from opening to closing
    attempt: int = 0  # counts doublings of the deadline and reopenings
    asked: frozenset[int] = frozenset()  # slots of the nodes asked
    heard: frozenset[int] = frozenset()  # slots whose updates from this theta are committed: acknowledged
    short: tuple[tuple[int, int], ...] = ()  # (slot, local steps) of nodes that do fewer than T, by slot
    entries: tuple[Entry, ...] = ()  # the newest ledger entries, oldest first
    heard_before: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Want:
    """What a node asks of the server; of a node, the server asks only for chunks of a displacement."""

    header: Header
    boot: int
    welcome: bool = False  # asks for its slot
    entries_from: int | None = None  # first ledger entry wanted
    blob: bytes | None = None  # hash of a blob of which `chunks` are wanted
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
