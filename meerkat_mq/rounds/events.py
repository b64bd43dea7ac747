"""What the machines are told, and what they ask for.

Events carry `now`, seconds on whatever clock drives the machine. Effects are carried out in order by a driver:
runtime/, in a service or in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from meerkat_mq.core.metrics import Metric
from meerkat_mq.core.path import Coefficient, Displacement, Entry
from meerkat_mq.errors import MeerkatError
from meerkat_mq.rounds.records import Judgement, RoundOutcome, Share, UpdateRecord, Verdict
from meerkat_mq.wire.descriptor import NodeStatus, ServerState
from meerkat_mq.wire.frames import Entries, Offer, Refusal, Round, Update, Values, Want, Welcome

# --- both machines ---


@dataclass(frozen=True, slots=True)
class Event:
    """Something has happened."""

    now: float


@dataclass(frozen=True, slots=True)
class Tick(Event):
    """The time that the machine named in `wake_at` has come."""


@dataclass(frozen=True, slots=True)
class Count:
    """Count something noteworthy."""

    reason: Metric
    node: str = ""  # which one it is about; "" where it is about none
    round: int | None = field(default=None, compare=False)  # that of the update, else the one that is open


@dataclass(frozen=True, slots=True)
class End:
    """The machine's work is over: a server ends with this error, a node leaves its run and joins it anew later."""

    error: MeerkatError


# --- what the server asks for ---


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
    """Keep an update, grouped with others; answered by UpdatesCommitted."""

    record: UpdateRecord
    last: bool  # no other update is awaited: commit at once


@dataclass(frozen=True, slots=True)
class FetchValues:
    """Get, check and keep the displacement that an update announces; answered by ValuesFetched."""

    node: str
    update: Update


@dataclass(frozen=True, slots=True)
class JudgeRound:
    """Measure the displacements among `records`, then call `judge` with them; answered by RoundJudged.

    Once and off the event loop: it is pure Python that takes up to a second.

    An answer may be lost, or reach the machine of a later term, which drops it.
    """

    term: int  # of the machine that asks
    version: int
    records: tuple[UpdateRecord, ...]  # that close with it
    judge: Callable[[tuple[UpdateRecord, ...]], RoundOutcome]  # touches nothing but what this machine gave it


@dataclass(frozen=True, slots=True)
class ApplyTerms:
    """Apply entry `version` to the server's theta; answered by TermsApplied.

    The shares add up to the mean displacement, in their order. It is encoded once and kept; what it decodes to is
    applied after the terms.
    """

    version: int
    terms: tuple[Coefficient, ...]
    shares: tuple[Share, ...] = ()


@dataclass(frozen=True, slots=True)
class CommitEntry:
    """Keep an entry, and the verdicts on its updates; answered by EntryCommitted."""

    entry: Entry
    records: tuple[UpdateRecord, ...]  # every update that closed with the round, refused ones too, by version and slot
    asked: int  # how many nodes were
    overdue: bool  # whether the deadline closed the round
    products: tuple[tuple[float, ...], ...] = ()  # ⟨g_p, z⟩ by lane and step; () where GradIP is not measured
    judgements: tuple[Judgement, ...] = ()  # of a calibration round, by slot


@dataclass(frozen=True, slots=True)
class KeepSnapshot:
    """Keep theta of `version`, to which entry `version` − 1 of hash `head` led, as a file."""

    version: int
    head: bytes


@dataclass(frozen=True, slots=True)
class TakeTerm:
    """A node has seen a term above this server's: take one above it, and begin again, or tell the machine to `stay`."""

    above: int
    node: str = field(default="", compare=False)


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


# --- what the server is told ---


@dataclass(frozen=True, slots=True)
class StatusCame(Event):
    """A node's birth or death arrived."""

    node: str
    status: NodeStatus


@dataclass(frozen=True, slots=True)
class UpdateCame(Event):
    """An update arrived."""

    node: str
    update: Update


@dataclass(frozen=True, slots=True)
class WantCame(Event):
    """A want arrived."""

    node: str
    want: Want


@dataclass(frozen=True, slots=True)
class ServerSeen(Event):
    """The retained server topic holds a state: this server's own, a late will, or a rival's."""

    state: ServerState


@dataclass(frozen=True, slots=True)
class SlotCommitted(Event):
    """The ledger holds a node's slot."""

    node: str


@dataclass(frozen=True, slots=True)
class UpdatesCommitted(Event):
    """The ledger holds these updates."""

    records: tuple[UpdateRecord, ...]


@dataclass(frozen=True, slots=True)
class ValuesFetched(Event):
    """The displacement that an update announced is decoded and kept; or it did not come: the update may come again."""

    node: str
    update: Update
    verdict: Verdict | None  # ACCEPTED, or what is wrong with its numbers; None: it did not come, or is none


@dataclass(frozen=True, slots=True)
class RoundJudged(Event):
    """What a closed round comes to; `term` and `version` as in JudgeRound."""

    term: int
    version: int
    outcome: RoundOutcome


@dataclass(frozen=True, slots=True)
class TermsApplied(Event):
    """The server's theta took entry `version`."""

    version: int
    digest: bytes  # of theta after it; zeros where none is due
    displacement: Displacement | None = None  # the encoded mean of the shares, kept; None without shares


@dataclass(frozen=True, slots=True)
class DirectionsMeasured(Event):
    """⟨g_p, z⟩ of every direction of a round: `products[lane][step]`, each exactly a float32."""

    version: int
    products: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class EntryCommitted(Event):
    """The ledger holds an entry, and what was to be kept with it."""

    commit: CommitEntry


ServerEvent = (
    StatusCame | UpdateCame | WantCame | ServerSeen | Tick | SlotCommitted | UpdatesCommitted | ValuesFetched
    | DirectionsMeasured | RoundJudged | TermsApplied | EntryCommitted
)  # fmt: skip
ServerEffect = (
    CommitSlot | CommitUpdate | FetchValues | JudgeRound | ApplyTerms | MeasureDirections | CommitEntry | KeepSnapshot
    | TakeTerm | PublishRound | PublishState | Reply | SendEntries | SendChunks | Count | End
)  # fmt: skip


# --- what a node asks for ---


@dataclass(frozen=True, slots=True)
class PublishStatus:
    """Publish the node's birth, retained."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send an update or a want to the server."""

    frame: Update | Want


@dataclass(frozen=True, slots=True)
class ApplyEntries:
    """Get the displacements of entries, apply all to the node's theta; answered by EntriesApplied or JobFailed."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class FetchSnapshot:
    """Get the snapshot that was offered, check it and load it; answered by SnapshotLoaded or JobFailed."""

    offer: Offer


@dataclass(frozen=True, slots=True)
class ResetTheta:
    """Put theta back to theta_0."""


@dataclass(frozen=True, slots=True)
class StartSteps:
    """Do the local steps of a round from the present theta; answered by StepsDone or JobFailed."""

    version: int
    lane: int
    steps: int
    eps: float


@dataclass(frozen=True, slots=True)
class StopSteps:
    """End the local steps after the one that is being made: what there is will do; answered by their StepsDone."""


@dataclass(frozen=True, slots=True)
class Forget:
    """The update from theta of `version` is acknowledged, or came too late: what was kept to send it again can go."""

    version: int
    heard: bool


# --- what a node is told ---


@dataclass(frozen=True, slots=True)
class Connected(Event):
    """A (new) connection to the broker stands."""


@dataclass(frozen=True, slots=True)
class ServerCame(Event):
    """The server's state arrived."""

    state: ServerState


@dataclass(frozen=True, slots=True)
class FrameCame(Event):
    """A round, or a reply of the server to this node, arrived."""

    frame: Round | Welcome | Entries | Offer | Refusal


@dataclass(frozen=True, slots=True)
class SnapshotLoaded(Event):
    """The node's theta is that of a snapshot, checked against its hash and digest."""

    version: int  # theta's version now
    head: bytes  # hash of entry `version` − 1
    digest: bytes  # of theta


@dataclass(frozen=True, slots=True)
class EntriesApplied(Event):
    """The node's theta took these entries; the digests are its own (zeros where none is due)."""

    entries: tuple[Entry, ...]
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class StepsDone(Event):
    """The local steps of a round are done, or as many as were made before StopSteps."""

    version: int
    scalars: tuple[float, ...]  # () with `values`; () without: not now, the node's limits do not allow any
    loss: float
    values: Values | None = None  # of a values node


@dataclass(frozen=True, slots=True)
class JobFailed(Event):
    """A displacement or a snapshot did not come, or the model could not do local steps; theta is as it was."""

    job: ApplyEntries | FetchSnapshot | StartSteps


NodeEvent = (
    Connected | ServerCame | FrameCame | EntriesApplied | SnapshotLoaded | StepsDone | JobFailed | Tick
)  # fmt: skip
NodeEffect = (
    PublishStatus | Send | ApplyEntries | FetchSnapshot | ResetTheta | StartSteps | StopSteps | Forget | Count | End
)
