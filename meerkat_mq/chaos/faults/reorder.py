"""Messages that overtake each other."""

from random import Random
from typing import Annotated, ClassVar

from pydantic import Field

from meerkat_mq.chaos.faults.treatment import Treatment
from meerkat_mq.chaos.proxy import Packet, Passage


class Reorder(Treatment):
    """The packet is held back, and later ones overtake it.

    Attributes:
        hold_s: for up to so long, drawn for each packet.
    """

    name: ClassVar[str] = "reorder"

    hold_s: Annotated[float, Field(gt=0, le=60)] = 0.5

    def treat(self, packet: Packet, random: Random) -> Passage:
        """Hold it."""
        return Passage(packet.data, hold_s=random.uniform(0.0, self.hold_s))
