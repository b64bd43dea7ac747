"""The proxy of the fault drills, with an account of what went through it."""

from collections.abc import Callable

from meerkat_mq.chaos.proxy import CONNACK, CONNECT, DISCONNECT, PUBACK, PUBLISH, SUBACK, SUBSCRIBE, Packet, Passage
from meerkat_mq.chaos.proxy import Proxy as FaultProxy

__all__ = [
    "CONNACK",
    "CONNECT",
    "DISCONNECT",
    "PUBACK",
    "PUBLISH",
    "SUBACK",
    "SUBSCRIBE",
    "Packet",
    "Passage",
    "Proxy",
]


class Proxy(FaultProxy):
    """Forwards to a broker's port.

    Attributes:
        packets: all that came, in order, also what was dropped.
        alter: takes each packet, gives what to forward: the same bytes, others, or None for nothing.
        pause_s: a packet comes so long after the one before.
    """

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port)
        self.packets: list[Packet] = []
        self.alter: Callable[[Packet], bytes | None] = lambda packet: packet.data
        self.pause_s = 0.0
        self.treat = lambda packet: Passage(self.alter(packet) or b"")

    def saw(self, packet: Packet) -> None:
        self.packets.append(packet)

    def narrow_s(self, size: int) -> float:
        return self.pause_s or super().narrow_s(size)

    def count(self, kind: int, *, up: bool) -> int:
        return sum(packet.kind == kind and packet.up == up for packet in self.packets)

    def drop(self, *kinds: int, up: bool = False) -> None:
        """From now on swallow packets of these kinds in one direction."""
        self.alter = lambda packet: None if packet.kind in kinds and packet.up == up else packet.data

    def pass_all(self) -> None:
        self.alter = lambda packet: packet.data
