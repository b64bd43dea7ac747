"""A whole federation in one process, on a virtual clock: the drivers of services on ports in memory.

Only the engines are real. Nothing fails by itself; whoever tests what happens then has the processes in hand.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

from meerkat_mq.config import NodeValuesConfig, PolicyConfig
from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Entry
from meerkat_mq.core.step import Engine, Row
from meerkat_mq.errors import MeerkatError
from meerkat_mq.ledger.store import Products
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import Judgement, UpdateRecord
from meerkat_mq.runtime.model import EngineModel, Model, NodeProfile
from meerkat_mq.runtime.policy import NodePolicy
from meerkat_mq.wire.arrays import MAX_BLOB_WEIGHTS
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.worlds.broker import Broker, VirtualMessage
from meerkat_mq.worlds.clock import VirtualClock, VirtualProcess
from meerkat_mq.worlds.compute import VirtualStepCompute
from meerkat_mq.worlds.ledger import MemoryLedger
from meerkat_mq.worlds.node import MemoryNodeStore, NodeProcess
from meerkat_mq.worlds.replica import Thetas
from meerkat_mq.worlds.run import FEDERATION, make_run
from meerkat_mq.worlds.server import ServerProcess
from meerkat_mq.worlds.store import MemoryStore
from meerkat_mq.worlds.world import World

DRAWN_BYTES = 2**30  # of directions that are kept for the other nodes of a lane
THETAS = 1
ANYTHING = NodePolicy(
    PolicyConfig(max_weights=MAX_BLOB_WEIGHTS, max_mask_bytes=2**31, min_eps=1e-300, max_eps=1e300, max_lr=1e300)
)


@dataclass(frozen=True)
class NodePart:
    """What a node brings.

    Attributes:
        steps_s: virtual seconds that a round's local steps take.
        values: of a values node: how it steps; None of a path node.
        policy: what it lets the server ask of it: by default anything, for whoever has a world has all its rows.
    """

    name: str
    engine: Engine[Any]
    rows: Sequence[Row]
    steps_s: float = 0.01
    values: NodeValuesConfig | None = None
    policy: NodePolicy = ANYTHING


class Federation:
    """Server and nodes on one virtual clock.

    Args:
        settings: the rules of the run's rounds.
        mask: of the run.
        parts: of the nodes.
        commit_s: virtual seconds of one commit.
        routed: is told of each message that reaches the broker.
        delivered: is told of each message that reaches a client.

    Attributes:
        ledger: of the run.
        counts: (who, reason) of what the server counted.
        errors: (who, error) of what ended a process.
        nodes: by name.
        server: the one that was started last.
        parts: by name; whoever replaces one gives a node other data or times from its next start on.
    """

    def __init__(
        self,
        settings: RoundSettings,
        mask: Mask,
        parts: Sequence[NodePart],
        *,
        commit_s: float = 0.0,
        routed: Callable[[VirtualMessage], None] = lambda message: None,
        delivered: Callable[[VirtualMessage], None] = lambda message: None,
    ) -> None:
        self.settings = settings
        self.clock = VirtualClock()
        self.ledger = MemoryLedger()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.errors: list[tuple[str, MeerkatError]] = []
        run = make_run(settings, mask)
        chance = random.Random(0)  # noqa: S311 - chance to be repeated, not to be secret
        broker = Broker(self.clock, chance, routed=routed, delivered=delivered)
        self._world = World(
            self.clock, broker, run, Thetas(run, THETAS),
            failed=lambda who, error: self.errors.append((who, error)),
            count=lambda who, reason: self.counts.update([(who, reason)]),
        )  # fmt: skip
        self._commit_s = commit_s
        self._draw = lru_cache(maxsize=min(1024, DRAWN_BYTES // (4 * mask.size)))(direction)
        self._numbers = count()
        self.parts = {part.name: part for part in parts}
        self.nodes: Mapping[str, NodeProcess] = {part.name: self._node(part) for part in parts}
        self.server = self._server()

    def _server(self) -> ServerProcess:
        return ServerProcess(f"{next(self._numbers):016x}", self._world, self.ledger, commit_s=self._commit_s)

    def _node(self, part: NodePart) -> NodeProcess:
        def compute(process: VirtualProcess) -> VirtualStepCompute:
            return VirtualStepCompute(process, self.parts[part.name].steps_s)

        return NodeProcess(
            NodeProfile(part.name, FEDERATION, values=part.values is not None),
            self._world,
            MemoryNodeStore(self._world.run.mask),
            compute=compute,
            make_model=lambda process, run, mask: self.make_model(process, run),
            policy=part.policy,
        )

    def make_model(self, node: NodeProcess, run: RunDescriptor) -> Model:
        """The model of a node that joins the run."""
        part = self.parts[node.name]
        return EngineModel(
            run,
            self._world.thetas.replica(),
            name=part.name,
            engine=part.engine,
            data=part.rows,
            draw=self._draw,
            take_steps=node.store.take_steps,
            values=part.values,
        )

    # --- people's hands ---

    def start(self) -> None:
        """Start the server, then every node."""
        self.start_server()
        for node in self.nodes.values():
            node.start()

    def start_server(self) -> None:
        """Start a server on the ledger, under the next term."""
        self.server = self._server()
        self.server.start()

    def kill_server(self) -> None:
        """End the server as SIGKILL does."""
        self.server.kill()

    def reconnect(self, name: str) -> None:
        """Cut a node's connection; it stands again soon, under another link."""
        self._world.broker.break_link(self.nodes[name].client)

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        """Let virtual time pass, until the run is finished, or `done`, or it is `until`."""
        self.clock.run(until, lambda: self.finished or done())

    # --- what came of it ---

    @property
    def finished(self) -> bool:
        """Whether all rounds are closed."""
        return self.version >= self.settings.count

    @property
    def version(self) -> int:
        """How many entries there are."""
        return len(self.ledger.entries)

    @property
    def store(self) -> MemoryStore:
        """To read the ledger."""
        return MemoryStore(self.ledger)

    @property
    def theta(self) -> Float32Array:
        """Committed, float32 (n,)."""
        assert self.server.driver is not None
        return self.server.driver.writer.committed[1]

    @property
    def entries(self) -> list[Entry]:
        """Of the ledger."""
        return [closed.entry for closed in self.ledger.entries.values()]

    @property
    def records(self) -> list[tuple[UpdateRecord, ...]]:
        """The updates of each entry."""
        store = self.store
        return [store.records(version) for version in self.ledger.entries]

    @property
    def products(self) -> list[Products]:
        """⟨g_p, z⟩ of each entry's directions, by lane and step."""
        return list(self.ledger.products.values())

    @property
    def judgements(self) -> list[Judgement]:
        """Of all calibration rounds, oldest first."""
        return [found for judged in self.ledger.judgements.values() for found in judged.values()]
