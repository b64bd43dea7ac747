"""What the machines are told, and what they ask for.

Events carry `now`, seconds on whatever clock drives the machine. Effects are carried out in order by a driver:
the asyncio services, or the in-memory federation.
"""

from dataclasses import dataclass, field

from meerkat_mq.core.path import Displacement, Entry, Term
from meerkat_mq.errors import MeerkatError
from meerkat_mq.rounds.records import Judgement, Share, UpdateRecord, Verdict
from meerkat_mq.wire.descriptor import NodeStatus, ServerState
from meerkat_mq.wire.frames import Entries, Offer, Refusal, Round, Update, Values, Want, Welcome

# --- events of the server -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StatusCame:
    """A node's birth or death arrived."""

    now: float
    node: str
    status: NodeStatus


@dataclass(frozen=True, slots=True)
class UpdateCame:
    """An update arrived."""

    now: float
    node: str
    update: Update


@dataclass(frozen=True, slots=True)
class WantCame:
    """A want arrived."""

    now: float
    node: str
    want: Want


@dataclass(frozen=True, slots=True)
class ServerSeen:
    """The retained server topic holds a state: this server's own, a late will, or a rival's."""

    now: float
    state: ServerState


@dataclass(frozen=True, slots=True)
class SlotCommitted:
    """The ledger holds a node's slot."""

    now: float
    node: str


@dataclass(frozen=True, slots=True)
class UpdatesCommitted:
    """The ledger holds these updates."""

    now: float
    records: tuple[UpdateRecord, ...]


@dataclass(frozen=True, slots=True)
class ValuesCame:
    """The displacement that an update announced is there, decoded without error, and kept.

    Attributes:
        verdict: ACCEPTED, or what is wrong with its numbers.
    """

    now: float
    node: str
    update: Update
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class ValuesMissed:
    """The displacement that an update announced did not come, or is none: the node may send its update again."""

    now: float
    node: str
    update: Update


@dataclass(frozen=True, slots=True)
class TermsApplied:
    """The server's theta took entry `version`.

    Attributes:
        digest: of theta after it; zeros where none is due.
        displacement: the encoded mean of the shares, kept; None without shares.
    """

    now: float
    version: int
    digest: bytes
    displacement: Displacement | None = None


@dataclass(frozen=True, slots=True)
class DirectionsMeasured:
    """⟨g_p, z⟩ of every direction of a round: `products[lane][step]`, each exactly a float32."""

    now: float
    version: int
    products: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class EntryCommitted:
    """The ledger holds entry `version`, made of these updates; the rest as in CommitEntry."""

    now: float
    version: int
    records: tuple[UpdateRecord, ...]
    products: tuple[tuple[float, ...], ...] = ()
    judgements: tuple[Judgement, ...] = ()


# --- events of a node -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connected:
    """A (new) connection to the broker stands."""

    now: float


@dataclass(frozen=True, slots=True)
class ServerCame:
    """The server's state arrived."""

    now: float
    state: ServerState


@dataclass(frozen=True, slots=True)
class FrameCame:
    """A round, or a reply of the server to this node, arrived."""

    now: float
    frame: Round | Welcome | Entries | Offer | Refusal


@dataclass(frozen=True, slots=True)
class SnapshotLoaded:
    """The node's theta is that of a snapshot, checked against its hash and digest.

    Attributes:
        version: theta's version now.
        head: hash of entry `version` − 1.
        digest: of theta.
    """

    now: float
    version: int
    head: bytes
    digest: bytes


@dataclass(frozen=True, slots=True)
class SnapshotMissed:
    """A snapshot did not come, or is not what was offered; theta is as it was."""

    now: float
    version: int


@dataclass(frozen=True, slots=True)
class EntriesApplied:
    """The node's theta took these entries; the digests are its own (zeros where none is due)."""

    now: float
    entries: tuple[Entry, ...]
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class EntriesMissed:
    """A displacement of these entries did not come; theta is as it was."""

    now: float
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class StepsDone:
    """The local steps of a round are done, or as many as were made before StopSteps.

    Attributes:
        scalars: () with `values`; () without: not now, the node's limits do not allow any.
        values: of a values node.
    """

    now: float
    version: int
    scalars: tuple[float, ...]
    loss: float
    values: Values | None = None


# --- for both -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that the machine named in `wake_at` has come."""

    now: float


@dataclass(frozen=True, slots=True)
class Count:
    """Count something noteworthy, by reason.

    Attributes:
        round: that it is about: that of the update, else the one that is open.
    """

    reason: str
    node: str = ""
    round: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class End:
    """The service ends with this error."""

    error: MeerkatError


# --- effects of the server ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MeasureDirections:
    """Compute ⟨g_p, z⟩ of every direction of a round; answered by DirectionsMeasured."""

    version: int
    lanes: int
    steps: int


@dataclass(frozen=True, slots=True)
class CommitSlot:
    """Keep a node's slot; answered by SlotCommitted."""

    node: str
    slot: int


@dataclass(frozen=True, slots=True)
class CommitUpdate:
    """Keep an update, grouped with others; answered by UpdatesCommitted.

    Attributes:
        last: no other update is awaited: commit at once.
    """

    record: UpdateRecord
    last: bool


@dataclass(frozen=True, slots=True)
class FetchValues:
    """Get, check and keep the displacement that an update announces; answered by ValuesCame or ValuesMissed."""

    node: str
    update: Update


@dataclass(frozen=True, slots=True)
class ApplyTerms:
    """Apply entry `version` to the server's theta; answered by TermsApplied.

    Attributes:
        shares: of the mean displacement, in the order in which they are added; it is encoded once, kept, and what it
            decodes to is applied after the terms.
    """

    version: int
    terms: tuple[Term, ...]
    shares: tuple[Share, ...] = ()


@dataclass(frozen=True, slots=True)
class CommitEntry:
    """Keep an entry, and the verdicts on its updates; answered by EntryCommitted.

    Attributes:
        records: every update that closed with the round, refused ones too, by version and slot.
        asked: how many nodes were asked.
        overdue: whether the deadline closed the round.
        products: ⟨g_p, z⟩ by lane and step; empty where the run does not measure GradIP.
        judgements: of a calibration round, by slot.
    """

    entry: Entry
    records: tuple[UpdateRecord, ...]
    asked: int
    overdue: bool
    products: tuple[tuple[float, ...], ...] = ()
    judgements: tuple[Judgement, ...] = ()


@dataclass(frozen=True, slots=True)
class KeepSnapshot:
    """Keep theta of `version`, to which entry `version` − 1 of hash `head` led, as a file."""

    version: int
    head: bytes


@dataclass(frozen=True, slots=True)
class TakeTerm:
    """Nodes follow a term above this server's: take one above theirs, and begin again."""

    above: int


@dataclass(frozen=True, slots=True)
class PublishRound:
    """Publish the round frame, retained."""

    frame: Round


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer one node."""

    node: str
    frame: Welcome | Refusal


@dataclass(frozen=True, slots=True)
class SendEntries:
    """Help one node on that stands at version `first`: with entries, or with the offer of a snapshot."""

    node: str
    first: int


@dataclass(frozen=True, slots=True)
class SendChunks:
    """Answer one node with chunks of a blob."""

    node: str
    want: Want


@dataclass(frozen=True, slots=True)
class PublishState:
    """Publish the server's state, retained."""

    finished: bool


# --- effects of a node ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PublishStatus:
    """Publish the node's birth, retained."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send an update or a want to the server."""

    frame: Update | Want


@dataclass(frozen=True, slots=True)
class ApplyEntries:
    """Get the displacements of entries, apply all to the node's theta; answered by EntriesApplied or EntriesMissed."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class FetchSnapshot:
    """Get the snapshot that was offered, check it and load it; answered by SnapshotLoaded or SnapshotMissed."""

    offer: Offer


@dataclass(frozen=True, slots=True)
class ResetTheta:
    """Put theta back to theta_0."""


@dataclass(frozen=True, slots=True)
class StartSteps:
    """Do the local steps of a round from the present theta; answered by StepsDone."""

    version: int
    lane: int
    steps: int
    eps: float


@dataclass(frozen=True, slots=True)
class StopSteps:
    """End the local steps after the one that is being made: what there is will do; answered by their StepsDone."""

    version: int


@dataclass(frozen=True, slots=True)
class Forget:
    """The update from theta of `version` is heard, or came too late: what was kept to send it again can go."""

    version: int
    heard: bool


ServerEvent = (
    StatusCame
    | UpdateCame
    | WantCame
    | ServerSeen
    | SlotCommitted
    | UpdatesCommitted
    | ValuesCame
    | ValuesMissed
    | TermsApplied
    | DirectionsMeasured
    | EntryCommitted
    | Tick
)
ServerEffect = (
    CommitSlot
    | CommitUpdate
    | FetchValues
    | ApplyTerms
    | MeasureDirections
    | CommitEntry
    | KeepSnapshot
    | TakeTerm
    | PublishRound
    | PublishState
    | Reply
    | SendEntries
    | SendChunks
    | Count
    | End
)
NodeEvent = (
    Connected
    | ServerCame
    | FrameCame
    | EntriesApplied
    | EntriesMissed
    | SnapshotLoaded
    | SnapshotMissed
    | StepsDone
    | Tick
)
NodeEffect = (
    PublishStatus | Send | ApplyEntries | FetchSnapshot | ResetTheta | StartSteps | StopSteps | Forget | Count | End
)
