"""Where the machines stand, and which event leads from where to where.

Every event may come in every phase; one that a table does not name leaves the phase as it is. A machine that has put
forth `End` or `TakeTerm` is left to its driver, which makes no further use of it.
"""

from collections.abc import Mapping
from enum import Enum, auto

from meerkat_mq.rounds import events as e


class ServerPhase(Enum):
    """Where the server's machine stands."""

    WAITING = auto()  # no round is open: too few nodes are at hand
    OPEN = auto()  # nodes are asked; updates come and are committed
    JUDGING = auto()  # it is decided which updates the entry is made of
    APPLYING = auto()  # it is decided what the entry says, but for theta's digest
    COMMITTING = auto()  # the entry is on its way into the ledger
    FINISHED = auto()  # the ledger holds all entries of the run


class NodePhase(Enum):
    """Where a node's machine stands."""

    IDLE = auto()  # nothing to do: no round asks anything of it, or none is known
    BEHIND = auto()  # the newest round is of a later theta: the entries that lack are asked for
    APPLYING = auto()  # theta takes entries
    LOADING = auto()  # a snapshot is fetched and loaded
    STEPPING = auto()  # local steps are made
    SENDING = auto()  # steps are done, and their update is sent until it is acknowledged or too late


S, N = ServerPhase, NodePhase
SERVER_TRANSITIONS: Mapping[ServerPhase, Mapping[type[e.ServerEvent], frozenset[ServerPhase]]] = {
    S.WAITING: {
        e.StatusCame: frozenset({S.OPEN, S.JUDGING}),  # a node's birth; JUDGING: its update is in the ledger
    },
    S.OPEN: {
        e.UpdatesCommitted: frozenset({S.JUDGING}),  # nobody is left to wait for
        e.StatusCame: frozenset({S.JUDGING}),  # it was the last one awaited, and left
        e.DirectionsMeasured: frozenset({S.JUDGING}),  # all but this was there
        e.Tick: frozenset({S.JUDGING}),  # the deadline, or the end of a grace, with a quorum
    },
    S.JUDGING: {e.RoundJudged: frozenset({S.APPLYING})},
    S.APPLYING: {e.TermsApplied: frozenset({S.COMMITTING})},
    S.COMMITTING: {e.EntryCommitted: frozenset({S.OPEN, S.JUDGING, S.WAITING, S.FINISHED})},
    S.FINISHED: {},
}

# With each event a node also does what is next: it catches up before it steps, and steps before it waits.
AWAITED = frozenset({N.IDLE, N.BEHIND, N.APPLYING, N.SENDING})
NODE_TRANSITIONS: Mapping[NodePhase, Mapping[type[e.NodeEvent], frozenset[NodePhase]]] = {
    N.IDLE: {
        e.FrameCame: frozenset({N.BEHIND, N.APPLYING, N.LOADING, N.STEPPING}),
        **dict.fromkeys((e.Connected, e.ServerCame, e.Tick), frozenset({N.STEPPING})),  # the pause after a failure ends
    },
    N.BEHIND: {
        e.FrameCame: frozenset({N.IDLE, N.APPLYING, N.LOADING, N.STEPPING, N.SENDING}),
        e.ServerCame: frozenset({N.IDLE, N.APPLYING, N.SENDING}),  # a new term: its round is not known yet
        **dict.fromkeys((e.Connected, e.Tick), frozenset({N.APPLYING})),  # what was missed is tried again
    },
    N.APPLYING: dict.fromkeys((e.EntriesApplied, e.JobFailed), AWAITED - {N.APPLYING} | {N.STEPPING}),
    N.LOADING: dict.fromkeys((e.SnapshotLoaded, e.JobFailed), AWAITED | {N.STEPPING}),
    N.STEPPING: dict.fromkeys((e.StepsDone, e.JobFailed), AWAITED),
    N.SENDING: {
        e.FrameCame: frozenset({N.IDLE, N.BEHIND, N.APPLYING, N.LOADING, N.STEPPING}),
        **dict.fromkeys((e.Connected, e.ServerCame, e.Tick), frozenset({N.STEPPING})),
    },
}
