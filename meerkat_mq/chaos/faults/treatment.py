"""Faults that treat packets one by one."""

from abc import abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import ClassVar, Literal

from meerkat_mq.chaos.faults.fault import Fault, Place, Share
from meerkat_mq.chaos.proxy import PUBLISH, Packet, Passage, as_it_is
from meerkat_mq.chaos.stage import Stage


class Treatment(Fault):
    """A fault of single packets; PUBLISH unless said otherwise, so that the stream stays valid MQTT.

    Attributes:
        share: of the packets, drawn for each.
        way: "up" to the broker, "down" from it, or "both".
        topic: only PUBLISH packets whose topic contains this.
    """

    on: ClassVar[Place] = "link"

    share: Share = 0.2
    way: Literal["up", "down", "both"] = "both"
    topic: str = ""

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Treat packets, let them pass again."""
        link = stage.links[target]
        link.treat = lambda packet: (
            self.treat(packet, random) if self.meets(packet) and random.random() < self.share else as_it_is(packet)
        )
        try:
            yield
        finally:
            link.treat = as_it_is

    def meets(self, packet: Packet) -> bool:
        """Whether the fault may strike this packet."""
        here = self.way == "both" or (self.way == "up") == packet.up
        return here and packet.kind == PUBLISH and self.topic in packet.topic

    @abstractmethod
    def treat(self, packet: Packet, random: Random) -> Passage:
        """What becomes of a packet that is struck."""
