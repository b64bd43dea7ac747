"""A node process of a world: the driver on ports in memory."""

from collections.abc import Callable
from dataclasses import dataclass, field

from meerkat_mq.core.mask import Mask
from meerkat_mq.runtime.model import KeptUpdate, Model, NodeProfile, Spent
from meerkat_mq.runtime.node import NodeDriver
from meerkat_mq.runtime.policy import DEFAULTS, NodePolicy
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor
from meerkat_mq.wire.topics import Topics
from meerkat_mq.worlds.broker import LARGEST_PACKET, Client
from meerkat_mq.worlds.clock import VirtualProcess
from meerkat_mq.worlds.compute import VirtualStepCompute
from meerkat_mq.worlds.world import World


@dataclass
class MemoryNodeStore:
    """What a node keeps between its lives."""

    mask: Mask | None = None
    update: tuple[str, KeptUpdate] | None = None
    steps: dict[str, int] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)
    day: str = "a day"  # it lasts until somebody changes it

    def has_taken_part(self) -> bool:
        """Whether this node has made local steps in some run."""
        return bool(self.steps)

    def load_mask(self, mask_hash: bytes) -> Mask | None:
        """The mask with this hash, if it was kept."""
        return self.mask if self.mask is not None and self.mask.hash == mask_hash else None

    def keep_mask(self, mask: Mask) -> None:
        """Keep a mask, and no other."""
        self.mask = mask

    def load_update(self, run: RunDescriptor) -> KeptUpdate | None:
        """The update that was kept, if it is of this run."""
        return self.update[1] if self.update is not None and self.update[0] == run.run else None

    def keep_update(self, run: RunDescriptor, kept: KeptUpdate) -> None:
        """Keep an update, and no other."""
        self.update = run.run, kept

    def forget_update(self) -> None:
        """Keep no update."""
        self.update = None

    def take_steps(self, run: str, count: int) -> int:
        """Move the data pointer of a run on by `count` local steps; returns the first of them."""
        first = self.steps.get(run, 0)
        self.steps = {run: first + count}
        return first

    def spend(self, run: str, first: float, more: float, most: float) -> bool:
        """Count directions of a row today, unless they would be too many."""
        spent = self.spent.then(self.day, run, first, more, most)
        self.spent = spent or self.spent
        return spent is not None

    def fetch(self, size: int, most: int) -> bool:
        """Count bytes that will be fetched today, unless they would be too many."""
        spent = self.spent.fetching(self.day, size, most)
        self.spent = spent or self.spent
        return spent is not None


class NodeProcess(VirtualProcess):
    """One node; each life has a boot of its own, and begins at theta_0. It is its driver's monitor.

    Args:
        profile: of the node.
        world: it lives in.
        store: outlives the process.
        compute: makes the worker of a life.
        make_model: makes the model of a run.
        latency_s: of its link.
        largest: MQTT packet, in bytes.
        policy: what it lets a server ask of it.

    Attributes:
        boot: of the present life.
        make_driver: makes the driver of a life.
        driver: of the present life.
        model: of the present life; None until it has joined a run.
        client: its session.
    """

    def __init__(
        self,
        profile: NodeProfile,
        world: World,
        store: MemoryNodeStore,
        *,
        compute: Callable[[VirtualProcess], VirtualStepCompute],
        make_model: Callable[["NodeProcess", RunDescriptor, Mask], Model],
        latency_s: float = 0.001,
        largest: int = LARGEST_PACKET,
        policy: NodePolicy = DEFAULTS,
    ) -> None:
        super().__init__(profile.name, world.clock, world.failed)
        self.boot = 0
        self.make_driver: Callable[..., NodeDriver] = NodeDriver
        self.driver: NodeDriver | None = None
        self.model: Model | None = None
        self.store = store
        self._profile = profile
        self._world = world
        self._compute = compute
        self._make_model = make_model
        self._latency_s, self._largest = latency_s, largest
        self._policy = policy
        self._topics = Topics(profile.federation)
        self.client = self._session()

    def _session(self) -> Client:
        topics, name = self._topics, self._profile.name
        return Client(
            self._world.broker,
            self,
            filters=[topics.server, topics.run, topics.round, topics.reply(name)],
            own=topics.up(name, "status"),
            will=lambda link: self.status("lost", link).encode(),
            latency_s=self._latency_s,
            largest=self._largest,
        )

    def start(self) -> None:
        """Begin at theta_0, under another boot."""
        super().start()
        self.boot += 1
        self.model = None
        self.client = self._session()
        self.driver = self.make_driver(
            self._profile,
            self.boot,
            transport=self.client,
            store=self.store,
            compute=self._compute(self),
            clock=self,
            make_model=lambda run, mask: self._make_model(self, run, mask),
            monitor=self,
            read=self._world.read,
            policy=self._policy,
        )
        self.client.join(self.driver)

    def kill(self, *, will_s: float = 0.0) -> None:
        """End: the broker publishes the will, after the keep-alive if need be."""
        super().kill()
        self._world.broker.leave(self.client, will_s=will_s)

    def leave(self) -> None:
        """End in order."""
        VirtualProcess.kill(self)
        self._world.broker.leave(self.client, farewell=self.status("stopped", self.client.link or 0).encode())

    def status(self, word: str, link: int, wakes_in_s: int | None = None) -> NodeStatus:
        """What its status topic says."""
        assert self.driver is not None
        return self.driver.status(word, link, wakes_in_s)

    # --- what its driver tells ---

    def ready(self, run: RunDescriptor, mask: Mask, model: Model) -> None:
        """The node has a run's mask and model."""
        self.model = model

    def changed(self) -> None:
        """The node may have nothing more to do."""

    def finished(self, version: int, theta: bytes) -> None:
        """The node has all entries of its run."""
