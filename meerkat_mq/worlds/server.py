"""A server process of a world: the driver on ports in memory."""

from meerkat_mq.ledger.recovery import recovered
from meerkat_mq.ledger.snapshots import Snapshots
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.runtime.ports import ServerMonitor
from meerkat_mq.runtime.server import ServerDriver
from meerkat_mq.runtime.succession import Past
from meerkat_mq.runtime.writer import Holdings
from meerkat_mq.wire.topics import Topics
from meerkat_mq.worlds.broker import LARGEST_PACKET, Client
from meerkat_mq.worlds.clock import VirtualProcess
from meerkat_mq.worlds.compute import VirtualCompute
from meerkat_mq.worlds.ledger import MemoryLedger
from meerkat_mq.worlds.run import FEDERATION
from meerkat_mq.worlds.store import MemoryStore
from meerkat_mq.worlds.world import World


class ServerProcess(VirtualProcess, ServerMonitor):
    """One server process; several may share a ledger. It is its driver's monitor.

    Args:
        server_id: 16 hex digits.
        world: it lives in.
        ledger: of the run, or empty.
        commit_s: seconds of one commit.
        measure_s: seconds that the inner products of a round's directions take.
        judge_s: seconds that other work takes: to judge a round, or look at a displacement.
        latency_s: of its link.
        largest: MQTT packet, in bytes.
        replace: whether it takes over from a server that is online.

    Attributes:
        driver: of the present life.
        client: its session.
    """

    def __init__(
        self,
        server_id: str,
        world: World,
        ledger: MemoryLedger,
        *,
        commit_s: float = 0.0,
        measure_s: float = 0.0,
        judge_s: float = 0.0,
        latency_s: float = 0.001,
        largest: int = LARGEST_PACKET,
        replace: bool = False,
    ) -> None:
        super().__init__("server", world.clock, world.failed)
        self.server_id = server_id
        self._world = world
        self._ledger = ledger
        self._commit_s, self._measure_s, self._judge_s = commit_s, measure_s, judge_s
        self._replace = replace
        self._topics = topics = Topics(FEDERATION)
        self.driver: ServerDriver | None = None
        self.client = Client(
            world.broker,
            self,
            filters=[topics.up("+", kind) for kind in ("status", "update", "want")],
            own=topics.server,
            will=self._will,
            latency_s=latency_s,
            largest=largest,
        )

    @property
    def machine(self) -> ServerMachine | None:
        """Of the present term."""
        return self.driver.machine if self.driver is not None else None

    def start(self) -> None:
        """Begin: recover from the ledger, and connect."""
        super().start()
        self.call(self._begin)

    def _begin(self) -> None:
        run, store = self._world.run, MemoryStore(self._ledger, now=self.now, step=self.step)
        snapshots = Snapshots(store, run.descriptor)
        replica = recovered(store, run, snapshots, self._world.thetas.replica())
        self.driver = ServerDriver(
            FEDERATION,
            self.server_id,
            Holdings(run, store, replica, snapshots, Past.of(store)),
            transport=self.client,
            clock=self,
            ledger_work=VirtualCompute(self, self._commit_s),
            measure_work=VirtualCompute(self, self._measure_s, at_once=True),
            other_work=VirtualCompute(self, self._judge_s, at_once=True),
            monitor=self,
            replace=self._replace,
            read=self._world.read,
        )
        self.client.join(self.driver)

    def kill(self) -> None:
        """End: the broker publishes the will."""
        super().kill()
        self._world.broker.leave(self.client)

    def _will(self, link: int) -> bytes:
        assert self.driver is not None
        return self.driver.state("lost", link).encode()

    # --- what its driver tells ---

    def counted(self, reason: str) -> None:
        """Something noteworthy happened."""
        self._world.count(self.name, reason)
