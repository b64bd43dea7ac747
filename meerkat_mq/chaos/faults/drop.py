"""Messages that get lost."""

from random import Random
from typing import ClassVar, Literal

from meerkat_mq.chaos.faults.treatment import Treatment
from meerkat_mq.chaos.proxy import KINDS, Packet, Passage


class Drop(Treatment):
    """The packet does not go through; by topic or by type.

    A sender of QoS 1 whose packet or acknowledgement is lost takes its connection for dead after 30 s.

    Attributes:
        packets: types of MQTT packet.
    """

    name: ClassVar[str] = "drop"

    packets: tuple[Literal["connect", "connack", "publish", "puback", "subscribe", "suback", "disconnect"], ...] = (
        "publish",
    )

    def meets(self, packet: Packet) -> bool:
        """Whether the fault may strike this packet."""
        here = self.way == "both" or (self.way == "up") == packet.up
        return here and packet.kind in {KINDS[kind] for kind in self.packets} and self.topic in packet.topic

    def treat(self, packet: Packet, random: Random) -> Passage:
        """Nothing goes."""
        return Passage(b"")
