"""A node that sends nonsense in valid frames."""

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from typing import ClassVar, Literal

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.proxy import Packet, Passage, as_it_is
from meerkat_mq.chaos.stage import Stage
from meerkat_mq.errors import WireError
from meerkat_mq.wire.frames import decode, encode
from meerkat_mq.wire.messages import Update

HUGE = 1e9
FLOAT32_MAX = (2 - 2**-23) * 2.0**127  # an update has no room for more


class Poison(Fault):
    """A node's projected gradients are replaced on their way, under a valid checksum.

    All else that a node sends passes as it is: a displacement and its chunks have no scalars.

    Attributes:
        how: "nan", "huge" (1e9), or "flip": the sign turned, times `scale`.
        scale: of "flip"; what float32 cannot hold becomes infinite.
    """

    name: ClassVar[str] = "poison"
    on: ClassVar[Place] = "node"
    scalars: ClassVar[bool] = True

    how: Literal["nan", "huge", "flip"] = "flip"
    scale: float = 10.0

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Poison its updates, leave them alone again."""
        link = stage.links[target]
        link.treat = self._treat
        try:
            yield
        finally:
            link.treat = as_it_is

    def may_be(self, scalars: Sequence[float]) -> bool:
        """Whether projected gradients look as if they were poisoned; those turned around do not show it."""
        return bool(scalars) and (self.how == "flip" or not all(abs(scalar) < HUGE / 10 for scalar in scalars))

    def _treat(self, packet: Packet) -> Passage:
        if not packet.up or not packet.topic.endswith("/update"):
            return as_it_is(packet)
        try:
            frame = decode(packet.payload)
        except WireError:
            return as_it_is(packet)
        if not isinstance(frame, Update) or not frame.scalars:
            return as_it_is(packet)
        poisoned = replace(frame, scalars=tuple(map(self._scalar, frame.scalars)))
        return Passage(packet.with_payload(encode(poisoned)))

    def _scalar(self, scalar: float) -> float:
        match self.how:
            case "nan":
                return math.nan
            case "huge":
                return HUGE
            case "flip":
                flipped = -self.scale * scalar
                return math.copysign(math.inf, flipped) if abs(flipped) > FLOAT32_MAX else flipped
