"""A server process on virtual ports, on a real ledger."""

from collections import Counter
from typing import Any

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.path import digest
from meerkat_mq.ledger.recovery import recovered
from meerkat_mq.ledger.snapshots import Snapshots
from meerkat_mq.ledger.sqlite import Ledger
from meerkat_mq.runtime.ports import ServerMonitor
from meerkat_mq.runtime.server import ServerDriver
from meerkat_mq.runtime.succession import Past
from meerkat_mq.runtime.writer import Holdings
from meerkat_mq.server.run import prepare_run
from meerkat_mq.wire.descriptor import NodeStatus, ServerState, decode_control
from meerkat_mq.wire.frames import encode
from meerkat_mq.wire.messages import Header, Update
from meerkat_mq.wire.topics import Topics
from tests.runtime.ports import Recorder, VirtualClock, Worker

TOPICS, SERVER_ID, OTHER_ID = Topics("f"), "c" * 16, "d" * 16


class OneServer(ServerMonitor):
    """A server process on virtual ports; it is its own monitor."""

    def __init__(self, ledger: Ledger, **more: Any) -> None:
        config = ServerConfig(federation="f", state_dir=ledger.path.parent, engine="toy", toy_weights=10, **more)
        self.ledger = ledger
        self.run = run = prepare_run(config)
        snapshots = Snapshots(ledger, run.descriptor)
        self.clock = VirtualClock()
        self.transport = Recorder()
        self.ledger_work = Worker(self.clock)
        self.counts: Counter[str] = Counter()
        self.terms: list[int] = []
        self._renewed = 0
        self.stands: list[int] = []
        self.driver = ServerDriver(
            "f",
            SERVER_ID,
            Holdings(run, ledger, recovered(ledger, run, snapshots), snapshots, Past.of(ledger)),
            transport=self.transport,
            clock=self.clock,
            ledger_work=self.ledger_work,
            measure_work=Worker(self.clock),
            other_work=Worker(self.clock),
            monitor=self,
        )

    def connect(self, link: int) -> None:
        self.transport.link = link
        self.driver.connected(link)
        self.clock.settle()

    def receive(self, topic: str, payload: bytes, *, retained: bool = False) -> None:
        self.driver.received(topic, payload, retained=retained)
        self.clock.settle()

    def take_charge(self) -> None:
        self.connect(1)
        self.reconnect()

    def reconnect(self) -> None:
        """As the transport does that was told to renew."""
        while self._renewed < self.transport.renewed:
            self._renewed += 1
            self.connect(1 + self._renewed)

    def born(self, node: str) -> None:
        """The node is online."""
        online = NodeStatus(status="online", boot=1, link=1, host="h", run=self.run.descriptor.run)
        self.receive(TOPICS.up(node, "status"), online.encode())

    def header(self, term: int | None = None, version: int | None = None) -> Header:
        """Of what a node says that is where the server is."""
        at = self.driver.header()
        return Header.of(
            self.run.descriptor.run_id,
            at.term if term is None else term,
            at.version if version is None else version,
            self.run.mask.hash,
        )

    def update(self, *scalars: float, **changes: Any) -> bytes:
        """An update that the server takes."""
        version, theta = self.driver.writer.committed
        fields: dict[str, Any] = {"header": self.header(version=version), "boot": 1, "base": digest(theta)[:8]}
        fields |= {"loss": 1.0, "scalars": scalars or (1.0,)}
        return encode(Update(**fields | changes))

    @property
    def states(self) -> list[ServerState]:
        return [decode_control(sent, ServerState) for sent in self.transport.on(TOPICS.server)]

    def counted(self, reason: str) -> None:
        self.counts[reason] += 1

    def took_term(self, term: int) -> None:
        self.terms.append(term)

    def stood(self, version: int, theta: Float32Array) -> None:
        self.stands.append(version)
