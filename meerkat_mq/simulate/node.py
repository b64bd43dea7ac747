"""A simulated node: the driver, on a model that makes its answers up, which may be duty-cycled, and may go wrong."""

import math
import random
import struct
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np

from meerkat_mq.config import Codec
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import short_hash
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.values import Residual
from meerkat_mq.node.state import decode_update, encode_update
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.model import KeptUpdate, Model, NodeProfile, StepResult, Stop
from meerkat_mq.runtime.node import NodeDriver
from meerkat_mq.simulate.reached import NOT_KEPT, UP_TO_DATE
from meerkat_mq.simulate.release import EarlierDriver
from meerkat_mq.simulate.schedule import Schedule
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import Offer, Values
from meerkat_mq.wire.values import encode_values
from meerkat_mq.worlds.clock import VirtualProcess
from meerkat_mq.worlds.compute import VirtualStepCompute
from meerkat_mq.worlds.node import MemoryNodeStore, NodeProcess
from meerkat_mq.worlds.run import FEDERATION
from meerkat_mq.worlds.world import World

CODECS: tuple[Codec, ...] = ("int8", "float32", "bfloat16")
AWAKE_S = 3.0  # a duty-cycled node stays no longer, unless it is in the middle of something
LOOK_S = 1.0  # between two looks at whether it may sleep
UNWILLING = 0.3  # share of a reluctant node's steps that its limits forbid
UNWILLING_S = 5.0  # for which they hardly ever do
BROUGHT_UP_TO_DATE = 0.3  # share of the later starts of a node of an earlier release that bring it up to date


class SimulatedStore(MemoryNodeStore):
    """A node's disk, with a kept update's file as each release writes it; `refused` is told what it did not take."""

    def __init__(self, refused: Callable[[], None]) -> None:
        super().__init__()
        self.file: bytes | None = None
        self.is_full = False
        self._refused = refused

    def keep_mask(self, mask: Mask) -> None:
        """Keep a mask, and no other."""
        if not self.is_full:
            super().keep_mask(mask)

    def load_update(self, run: RunDescriptor) -> KeptUpdate | None:
        """The update that was kept, if it is of this run."""
        return None if self.file is None else decode_update(self.file, run)

    def keep_update(self, run: RunDescriptor, kept: KeptUpdate) -> None:
        """Keep an update, and no other; on a full disk, the file before stays."""
        if self.is_full:
            self._refused()
        else:
            self.file = encode_update(run, kept)

    def forget_update(self) -> None:
        """Keep no update."""
        self.file = None


class SimulatedNode(NodeProcess):
    """One node; each life has a boot of its own, and begins at theta_0.

    Args:
        number: it is n0, n1, …
        world: it lives in.
        schedule: of the world.
        chance: of the world.

    Attributes:
        disk: its store.
        codec: of a values node's displacements; None of a path node.
        every_s: seconds that it sleeps; 0: it is always awake.
        release: of an earlier one, its commit; it is brought up to date at some start; "": today's.
        factor: of its projected gradients and displacements; 1.0 of an honest node.
        healed: called once its theta is right again; None while nothing is wrong with it.
    """

    def __init__(self, number: int, world: World, schedule: Schedule, chance: random.Random) -> None:
        name, latency_s = f"n{number}", chance.uniform(0.001, 0.05)
        self.disk = SimulatedStore(lambda: world.count(name, NOT_KEPT))
        self.codec = CODECS[number % len(CODECS)] if number < schedule.values else None
        self.every_s = schedule.every_s if number < schedule.sleepers else 0.0
        self.release = schedule.earlier if number == 0 else ""
        self.rows, self.schedule, self.factor = 1 + 3 * number, schedule, 1.0
        super().__init__(
            NodeProfile(name, FEDERATION, values=self.codec is not None, keeps=schedule.keeps),
            world,
            self.disk,
            compute=self._worker,
            make_model=lambda _, run, mask: MadeUpModel(run, world.thetas.replica(), self),
            latency_s=latency_s,
            largest=schedule.packet_bytes,
        )
        self.healed: Callable[[], None] | None = None
        self._reluctant = schedule.reluctant and number == 0
        self._step_s = schedule.step_s * chance.uniform(1.0, 1.5) * schedule.spread ** (number / (schedule.nodes - 1))
        if schedule.slow and number == schedule.nodes - 1:  # the update comes, but is not yet committed
            self._step_s = schedule.settings.deadline_s - 0.04 - schedule.commit_s / 2
        self._chance = chance
        self._awake_until = math.inf
        self._looking = False

    def _worker(self, process: VirtualProcess) -> VirtualStepCompute:
        return VirtualStepCompute(
            process,
            self._step_s,
            may_begin=lambda: not (self._reluctant and self._chance.random() < UNWILLING),
        )

    # --- life ---

    def start(self) -> None:
        """Begin at theta_0, under another boot."""
        self.end_count()
        self.is_right()
        self.make_driver = self._driver_of_release()
        if not self.schedule.keeps:
            self.disk.forget_update()
        super().start()
        self._stay_awake()

    def _driver_of_release(self) -> Callable[..., NodeDriver]:
        if self.release and self.boot and self._chance.random() < BROUGHT_UP_TO_DATE:
            self.release = ""
            self._world.count(self.name, UP_TO_DATE)
        return partial(EarlierDriver, self.release) if self.release else NodeDriver

    def kill(self, *, will_s: float | None = None) -> None:
        """End: the broker publishes the will, after the keep-alive if need be."""
        super().kill(will_s=self._chance.choice((0.0, 0.0, 1.0)) if will_s is None else will_s)

    def end_count(self) -> None:
        """What the life that is over counted."""
        for reason in () if self.driver is None else self.driver.counts.elements():
            self._world.count(self.name, reason)

    def corrupt(self) -> None:
        """Let theta be wrong."""
        if isinstance(self.model, MadeUpModel):
            self.model.corrupt()

    def is_right(self) -> None:
        """theta is what the ledger says."""
        healed, self.healed = self.healed, None
        if healed is not None:
            healed()

    @property
    def state(self) -> str:
        """What it does, for people."""
        if not self.alive or self.client.link is None:
            return "not connected" if self.alive else "not alive"
        machine = self.driver.machine if self.driver is not None else None
        return "starting" if machine is None else f"{machine.phase.name.lower()} at version {machine.version}"

    # --- sleep ---

    def _stay_awake(self) -> None:
        if self.every_s:
            self._awake_until = self.now() + AWAKE_S
            self.at(self.now() + LOOK_S, self._look_again)

    def _look_again(self) -> None:
        if self._sleep_if_due():
            self.at(self.now() + LOOK_S, self._look_again)

    def changed(self) -> None:
        """The node may have nothing more to do."""
        if self.every_s and not self._looking:
            self._looking = True
            self.at(self.now(), self._look)

    def _look(self) -> None:
        self._looking = False
        self._sleep_if_due()

    def _sleep_if_due(self) -> bool:
        """Sleep, where the driver lets; whether the node stays awake."""
        driver = self.driver
        if driver is None or self.client.closed:
            return False
        if not driver.may_sleep(self.now() >= self._awake_until):
            return True
        sleeps_s = self.every_s
        farewell = self.status("asleep", self.client.link or 0, math.ceil(sleeps_s)).encode()
        self._world.broker.leave(self.client, farewell=farewell)
        driver.sleep()
        self.at(self.now() + sleeps_s, self._wake_up)
        return False

    def _wake_up(self) -> None:
        assert self.driver is not None
        self.driver.wake()
        self.client.join(self.driver)
        self._stay_awake()


class MadeUpModel(Model):
    """`runtime.model.Model` whose answers theta, round, step and node decide, and the boot of a fickle node."""

    def __init__(self, run: RunDescriptor, replica: Replica, node: SimulatedNode) -> None:
        codec = node.codec
        super().__init__(run, replica, None if codec is None else Residual(codec, run.weights))
        self.rows, self.left_out = node.rows, 0
        self._node = node

    def corrupt(self) -> None:
        """Let theta be wrong."""
        self._replica.load(self._replica.theta + np.float32(1), self._replica.version)

    def reset(self) -> None:
        """Back to theta_0."""
        super().reset()
        self._node.is_right()

    def load(self, blob: bytes, offer: Offer) -> tuple[bytes, bytes]:
        """Go to a snapshot's theta."""
        loaded = super().load(blob, offer)
        self._node.is_right()
        return loaded

    def step(self, order: StartSteps, stop: Stop, made: int) -> StepResult:
        """The local steps of a round from the present theta, so many."""
        codec = self._node.codec
        scalar = partial(self._scalar, zlib.crc32(self._replica.theta.tobytes()), order)
        if codec is None:
            return StepResult(tuple(scalar(step) for step in range(made * self._run.perturbations)), 1.0)
        assert self._residual is not None
        blob = encode_values(self._residual.add(order.version, self._displacement(scalar)), codec)
        return StepResult((), 1.0, Values(short_hash(blob), len(blob), made), blob)

    def _scalar(self, theta: int, order: StartSteps, step: int) -> float:
        """A float32."""
        boot = self._node.boot if self._node.schedule.fickle else 0
        place = struct.pack("<IHHI", order.version, order.lane, step, boot)
        made = (zlib.crc32(place + self._node.name.encode(), theta) - 2**31 >> 8) / 2**22
        return float(np.float32(made * self._node.factor))

    def _displacement(self, scalar: Callable[[int], float]) -> Float32Array:
        """float32 (n,), within ±2**-4."""
        return np.array([scalar(index) for index in range(self._run.weights)], np.float32) / np.float32(32)
