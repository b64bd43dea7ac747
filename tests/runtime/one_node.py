"""One node on virtual ports: its driver, and a model that computes nothing."""

from dataclasses import dataclass, field

from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Entry
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.model import KeptUpdate, Model, NodeProfile, NodeStore, Place, StepResult, Stop
from meerkat_mq.runtime.node import NodeDriver
from meerkat_mq.runtime.policy import DEFAULTS, NodePolicy
from meerkat_mq.wire.arrays import encode_mask
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import Offer
from tests.runtime.ports import Recorder, StepWorker, VirtualClock

DIGEST = b"d" * 16  # of every theta but the first


def descriptor(mask: Mask, **changes: object) -> RunDescriptor:
    """Of a run with this mask."""
    blob = encode_mask(mask)
    settings = {
        "federation": "f", "run": "1" * 32, "engine": "toy", "model": "", "dtype": "float32",
        "fingerprint": "0" * 64, "tokenizer": "0" * 64, "mask": mask.hash.hex(), "mask_bytes": len(blob),
        "mask_chunks": -(-len(blob) // 65536), "weights": mask.size, "stream": "mk1", "rounds": 1, "local_steps": 1,
        "directions": 1, "lr": 0.1, "eps": 0.1, "batch_size": 1, "digest_every": 1,
    }  # fmt: skip
    return RunDescriptor.model_validate(settings | changes)


@dataclass
class PaperModel(Model):
    """Knows which entries it has, and how often it was asked for steps."""

    run: RunDescriptor
    mask: Mask
    entries: list[Entry] = field(default_factory=list)
    ordered: list[StartSteps] = field(default_factory=list)
    stepped: list[int] = field(default_factory=list)
    forgotten: list[tuple[int, bool]] = field(default_factory=list)
    rows: int = 3
    left_out: int = 0

    @property
    def place(self) -> Place:
        return self.mask.theta_0, len(self.entries)

    def go_to(self, place: Place) -> None:
        del self.entries[place[1] :]

    def apply(self, entries: tuple[Entry, ...], blob: bytes) -> tuple[bytes, ...]:
        self.entries += entries
        return tuple(DIGEST for _ in entries)

    def load(self, blob: bytes, offer: Offer) -> tuple[bytes, bytes]:
        raise AssertionError("nobody offered a snapshot")

    def reset(self) -> None:
        self.entries.clear()

    def step(self, order: StartSteps, stop: Stop, made: int) -> StepResult | None:
        self.ordered.append(order)
        return None if stop.is_set() else self.finish(order)

    def finish(self, order: StartSteps) -> StepResult:
        """As steps do that were made before anybody could stop them."""
        self.stepped.append(order.version)
        return StepResult((0.5,) * order.steps, 0.25)

    def forget(self, version: int, heard: bool) -> None:
        self.forgotten.append((version, heard))


class Nothing:
    """A state folder that never holds anything, as after a card was wiped."""

    def has_taken_part(self) -> bool:
        return False

    def load_mask(self, mask_hash: bytes) -> Mask | None:
        return None

    def keep_mask(self, mask: Mask) -> None:
        pass

    def load_update(self, run: RunDescriptor) -> KeptUpdate | None:
        return None

    def keep_update(self, run: RunDescriptor, kept: KeptUpdate) -> None:
        pass

    def forget_update(self) -> None:
        pass

    def spend(self, run: str, first: float, more: float, most: float) -> bool:
        return first + more <= most

    def fetch(self, size: int, most: int) -> bool:
        return size <= most


class OneNode:
    """A node process, and all that it did; it is its own presenter.

    Attributes:
        models: one a run, the newest last.
        ended: version and digest of each run that it has finished.
    """

    def __init__(self, store: NodeStore, profile: NodeProfile, boot: int = 7, policy: NodePolicy = DEFAULTS) -> None:
        self.clock = VirtualClock()
        self.worker = StepWorker(self.clock)
        self.transport = Recorder()
        self.models: list[PaperModel] = []
        self.ended: list[tuple[int, bytes]] = []
        self.changes = 0
        self.driver = NodeDriver(
            profile,
            boot,
            transport=self.transport,
            store=store,
            compute=self.worker,
            clock=self.clock,
            make_model=self._make_model,
            monitor=self,
            policy=policy,
        )

    @property
    def machine_is_there(self) -> bool:
        return self.driver.machine is not None

    def receive(self, topic: str, payload: bytes, *, retained: bool = False) -> None:
        """A message, and all that comes of it at once."""
        self.driver.received(topic, payload, retained=retained)
        self.clock.settle()

    def _make_model(self, run: RunDescriptor, mask: Mask) -> Model:
        self.models.append(PaperModel(run, mask))
        return self.models[-1]

    def ready(self, run: RunDescriptor, mask: Mask, model: Model) -> None:
        assert model is self.models[-1]

    def changed(self) -> None:
        self.changes += 1

    def finished(self, version: int, theta: bytes) -> None:
        self.ended.append((version, theta))
