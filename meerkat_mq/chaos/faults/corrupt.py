"""Messages whose bytes change on the way."""

from random import Random
from typing import ClassVar, Literal

from meerkat_mq.chaos.faults.treatment import Treatment
from meerkat_mq.chaos.proxy import Packet, Passage
from meerkat_mq.wire.frames import MAGIC


class Corrupt(Treatment):
    """One bit flips.

    Only in messages of the data plane: they carry a checksum. Control messages are plain JSON; against a link that
    changes those, TLS is the remedy.

    Attributes:
        part: "payload", so that the stream stays valid MQTT, or "length": the packet says that it ends elsewhere.
    """

    name: ClassVar[str] = "corrupt"

    part: Literal["payload", "length"] = "payload"

    def meets(self, packet: Packet) -> bool:
        """Whether the fault may strike this packet."""
        return super().meets(packet) and packet.payload.startswith(MAGIC)

    def treat(self, packet: Packet, random: Random) -> Passage:
        """Flip it."""
        if self.part == "length":
            return Passage(packet.data[:1] + bytes([packet.data[1] ^ 1 << random.randrange(7)]) + packet.data[2:])
        payload = bytearray(packet.payload)
        payload[random.randrange(len(payload))] ^= 1 << random.randrange(8)
        return Passage(packet.with_payload(bytes(payload)))
