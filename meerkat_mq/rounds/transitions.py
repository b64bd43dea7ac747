"""Where the machines stand, and what leads from where to where."""

from enum import Enum, auto


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
