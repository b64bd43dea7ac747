"""Messages that come twice."""

from random import Random
from typing import ClassVar

from meerkat_mq.chaos.faults.treatment import Treatment
from meerkat_mq.chaos.proxy import Packet, Passage


class Duplicate(Treatment):
    """The packet goes through twice."""

    name: ClassVar[str] = "duplicate"

    def treat(self, packet: Packet, random: Random) -> Passage:
        """Once more."""
        return Passage(packet.data * 2)
