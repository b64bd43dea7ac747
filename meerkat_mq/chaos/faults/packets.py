"""Faults of single MQTT packets on a link."""

import math
from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from typing import Annotated, Literal

from pydantic import Field

from meerkat_mq.chaos.faults.fault import Fault
from meerkat_mq.chaos.proxy import KINDS, PUBLISH, Packet, Passage, as_it_is
from meerkat_mq.chaos.stage import Stage
from meerkat_mq.config.section import Share
from meerkat_mq.errors import WireError
from meerkat_mq.wire.frames import MAGIC, decode, encode
from meerkat_mq.wire.messages import Update

HUGE = 1e9
FLOAT32_MAX = (2 - 2**-23) * 2.0**127  # an update has no room for more


class PacketFault(Fault):
    """A fault that decides on each packet how it goes on."""

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        link = stage.links[target]
        link.treat = lambda packet: self.passage(packet, random)
        try:
            yield
        finally:
            link.treat = as_it_is

    @abstractmethod
    def passage(self, packet: Packet, random: Random) -> Passage:
        """How a packet goes on, whatever it is."""


class Treatment(PacketFault):
    """A fault of a share of the packets; PUBLISH unless said otherwise, so that the stream stays valid MQTT.

    Attributes:
        share: of the packets, drawn for each.
        way: "up" to the broker, "down" from it, or "both".
        topic: only PUBLISH packets whose topic contains this.
    """

    on = "link"

    share: Share = 0.2
    way: Literal["up", "down", "both"] = "both"
    topic: str = ""

    def passage(self, packet: Packet, random: Random) -> Passage:
        here = self.way == "both" or (self.way == "up") == packet.up
        met = here and self.topic in packet.topic and self.meets(packet)
        return self.treat(packet, random) if met and random.random() < self.share else as_it_is(packet)

    def meets(self, packet: Packet) -> bool:
        """Whether the fault may strike packets of this kind."""
        return packet.kind == PUBLISH

    @abstractmethod
    def treat(self, packet: Packet, random: Random) -> Passage:
        """What becomes of a packet that is struck."""


class Cut(Treatment):
    """A part of the packet goes through, then the connection ends: at least one byte goes, at least one does not."""

    name = "cut"

    share: Share = 0.1

    def treat(self, packet: Packet, random: Random) -> Passage:
        return Passage(packet.data[: random.randrange(1, len(packet.data))], cut=True)


class Duplicate(Treatment):
    """The packet goes through twice."""

    name = "duplicate"

    def treat(self, packet: Packet, random: Random) -> Passage:
        return Passage(packet.data * 2)


class Reorder(Treatment):
    """The packet is held back for up to `hold_s`, drawn for each, and later ones overtake it."""

    name = "reorder"

    hold_s: Annotated[float, Field(gt=0, le=60)] = 0.5

    def treat(self, packet: Packet, random: Random) -> Passage:
        return Passage(packet.data, hold_s=random.uniform(0.0, self.hold_s))


class Drop(Treatment):
    """The packet does not go through; by topic or by type.

    A sender of QoS 1 whose packet or acknowledgement is lost takes its connection for dead after 30 s.

    Attributes:
        packets: types of MQTT packet.
    """

    name = "drop"

    packets: tuple[Literal["connect", "connack", "publish", "puback", "subscribe", "suback", "disconnect"], ...] = (
        "publish",
    )

    def meets(self, packet: Packet) -> bool:
        return packet.kind in {KINDS[kind] for kind in self.packets}

    def treat(self, packet: Packet, random: Random) -> Passage:
        return Passage(b"")


class Corrupt(Treatment):
    """One bit flips.

    Only in messages of the data plane: they carry a checksum. Control messages are plain JSON; against a link that
    changes those, TLS is the remedy.

    Attributes:
        part: "payload", so that the stream stays valid MQTT, or "length": the packet says that it ends elsewhere.
    """

    name = "corrupt"

    part: Literal["payload", "length"] = "payload"

    def meets(self, packet: Packet) -> bool:
        return packet.payload.startswith(MAGIC)

    def treat(self, packet: Packet, random: Random) -> Passage:
        if self.part == "length":
            return Passage(packet.data[:1] + bytes([packet.data[1] ^ 1 << random.randrange(7)]) + packet.data[2:])
        payload = bytearray(packet.payload)
        payload[random.randrange(len(payload))] ^= 1 << random.randrange(8)
        return Passage(packet.with_payload(bytes(payload)))


class Poison(PacketFault):
    """A node's projected gradients are replaced on their way, under a valid checksum.

    All else that a node sends passes as it is: a displacement and its chunks have no scalars.

    Attributes:
        how: "nan", "huge" (1e9), or "flip": the sign turned, times `scale`.
        scale: of "flip"; what float32 cannot hold becomes infinite.
    """

    name = "poison"
    on = "node"
    scalars = True

    how: Literal["nan", "huge", "flip"] = "flip"
    scale: float = 10.0

    def may_be(self, scalars: Sequence[float]) -> bool:
        """Whether projected gradients look as if they were poisoned; those turned around do not show it."""
        return bool(scalars) and (self.how == "flip" or not all(abs(scalar) < HUGE / 10 for scalar in scalars))

    def passage(self, packet: Packet, random: Random) -> Passage:
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
        if self.how != "flip":
            return math.nan if self.how == "nan" else HUGE
        flipped = -self.scale * scalar
        return math.copysign(math.inf, flipped) if abs(flipped) > FLOAT32_MAX else flipped
