"""One ledger writer on virtual ports, on a real ledger; it is its own owner, and keeps what it is told."""

from collections.abc import Iterable

from meerkat_mq.ledger.recovery import recovered
from meerkat_mq.ledger.run import Run
from meerkat_mq.ledger.snapshots import Snapshots
from meerkat_mq.ledger.sqlite import Ledger
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.records import UpdateRecord
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.runtime.succession import Past
from meerkat_mq.runtime.writer import Commit, Holdings, LedgerWriter, Task
from meerkat_mq.runtime.writer import Want as Asked
from meerkat_mq.wire.messages import Chunk, Entries, Header, Offer, Want
from tests.runtime.ports import VirtualClock, Worker

Frame = Entries | Offer | Chunk | Want
SERVER_ID = "c" * 16


class CountingLedger(Ledger):
    """Keeps the sizes of the groups."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.sizes: list[int] = []

    def commit_updates(self, records: Iterable[UpdateRecord]) -> None:
        records = list(records)
        self.sizes.append(len(records))
        super().commit_updates(records)


class OneWriter:
    """A writer, and all that it says.

    Attributes:
        told: what the machine hears.
        replied_before: for each of it, how many replies there were.
        replies: to whom, and what.
        distributed: displacements of entries.
        terms: that were taken, and their machines.
        outranked_times: how often another server's term was found.
        full: whether a reply finds no room.
    """

    def __init__(self, ledger: Ledger, run: Run) -> None:
        self.ledger, self.run = ledger, run
        self.clock = VirtualClock()
        self.worker = Worker(self.clock)
        self.snapshots = Snapshots(ledger, run.descriptor)
        self.replica = recovered(ledger, run, self.snapshots)
        self.told: list[e.ServerEvent] = []
        self.replied_before: list[int] = []
        self.replies: list[tuple[str, Frame]] = []
        self.distributed: list[bytes] = []
        self.terms: list[tuple[int, ServerMachine]] = []
        self.outranked_times = 0
        self.full = False
        self.writer = LedgerWriter(
            Holdings(run, ledger, self.replica, self.snapshots, Past.of(ledger)),
            compute=self.worker,
            clock=self.clock,
            server_id=SERVER_ID,
            owner=self,
        )

    def put(self, *orders: Commit | Task | Asked) -> None:
        """Put orders, and wait until all is done."""
        for order in orders:
            self.writer.put(order)
        idle: list[float] = []
        self.writer.when_idle(lambda: idle.append(self.clock.now()))
        self.clock.until(lambda: idle)
        self.clock.settle()  # wants

    def handle(self, event: e.ServerEvent) -> None:
        self.told.append(event)
        self.replied_before.append(len(self.replies))

    def reply(self, node: str, frame: Frame) -> bool:
        if not self.full:
            self.replies.append((node, frame))
        return not self.full

    def distribute(self, blob: bytes) -> None:
        self.distributed.append(blob)

    def header(self) -> Header:
        return Header.of(self.run.descriptor.run_id, 1, 0, self.run.mask.hash)

    def outranked(self) -> None:
        self.outranked_times += 1

    def took_term(self, term: int, machine: ServerMachine) -> None:
        self.terms.append((term, machine))
