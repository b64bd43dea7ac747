"""What the server's machine is told, and what it asks for."""

from collections.abc import Callable
from dataclasses import dataclass

from meerkat_mq.core.path import Coefficient, Displacement, Entry
from meerkat_mq.rounds.events.common import Count, End, Tick
from meerkat_mq.rounds.records import Judgement, RoundOutcome, Share, UpdateRecord, Verdict
from meerkat_mq.wire.descriptor import NodeStatus, ServerState
from meerkat_mq.wire.frames import Refusal, Round, Update, Want, Welcome

# --- events ---


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
class RoundJudged:
    """What a closed round comes to; `term` and `version` as in JudgeRound."""

    now: float
    term: int
    version: int
    outcome: RoundOutcome


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


# --- effects ---


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
class JudgeRound:
    """Call `judge`, once and off the event loop: pure Python that takes up to a second; answered by RoundJudged.

    An answer may be lost, or reach the machine of a later term, which drops it.

    Attributes:
        term: of the machine that asks.
        judge: touches nothing but what this machine gave it.
    """

    term: int
    version: int
    judge: Callable[[], RoundOutcome]


@dataclass(frozen=True, slots=True)
class ApplyTerms:
    """Apply entry `version` to the server's theta; answered by TermsApplied.

    Attributes:
        shares: of the mean displacement, in the order in which they are added; it is encoded once, kept, and what it
            decodes to is applied after the terms.
    """

    version: int
    terms: tuple[Coefficient, ...]
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


ServerAnswer = (  # to an effect
    SlotCommitted
    | UpdatesCommitted
    | ValuesCame
    | ValuesMissed
    | DirectionsMeasured
    | RoundJudged
    | TermsApplied
    | EntryCommitted
)
ServerEvent = StatusCame | UpdateCame | WantCame | ServerSeen | Tick | ServerAnswer
ServerEffect = (
    CommitSlot
    | CommitUpdate
    | FetchValues
    | JudgeRound
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
