"""A connection that breaks within a packet."""

from random import Random
from typing import ClassVar

from meerkat_mq.chaos.faults.fault import Share
from meerkat_mq.chaos.faults.treatment import Treatment
from meerkat_mq.chaos.proxy import Packet, Passage


class Cut(Treatment):
    """A part of the packet goes through, then the connection ends."""

    name: ClassVar[str] = "cut"

    share: Share = 0.1

    def treat(self, packet: Packet, random: Random) -> Passage:
        """At least one byte goes, at least one does not."""
        return Passage(packet.data[: random.randrange(1, len(packet.data))], cut=True)
