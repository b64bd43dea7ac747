"""What a node's machine is told, and what it asks for."""

from dataclasses import dataclass

from meerkat_mq.core.path import Entry
from meerkat_mq.rounds.events.common import Count, End, Tick
from meerkat_mq.wire.descriptor import ServerState
from meerkat_mq.wire.frames import Entries, Offer, Refusal, Round, Update, Values, Want, Welcome

# --- events ---


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


@dataclass(frozen=True, slots=True)
class StepsFailed:
    """The model could not do the local steps of a round; theta is as it was."""

    now: float
    version: int


# --- effects ---


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
    """Do the local steps of a round from the present theta; answered by StepsDone or StepsFailed."""

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
    """The update from theta of `version` is acknowledged, or came too late: what was kept to send it again can go."""

    version: int
    heard: bool


NodeEvent = (
    Connected
    | ServerCame
    | FrameCame
    | EntriesApplied
    | EntriesMissed
    | SnapshotLoaded
    | SnapshotMissed
    | StepsDone
    | StepsFailed
    | Tick
)
NodeEffect = (
    PublishStatus | Send | ApplyEntries | FetchSnapshot | ResetTheta | StartSteps | StopSteps | Forget | Count | End
)
