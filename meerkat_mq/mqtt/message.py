"""What goes over a session: messages, wills, and the count of both."""

from dataclasses import dataclass

from meerkat_mq.wire.limits import packet_bytes


@dataclass(frozen=True)
class Message:
    """A message from the broker; `retained`: it kept it, and sends it because of our subscription."""

    topic: str
    payload: bytes
    retained: bool = False
    qos: int = 0


@dataclass(frozen=True)
class Will:
    """The state that stands on a topic of ours when we are gone: retained, QoS 1."""

    topic: str
    payload: bytes


@dataclass
class MessageCount:
    """Messages in one direction: their payloads, and the whole PUBLISH packets (no TCP/IP, TLS, acknowledgements)."""

    messages: int = 0
    payload_bytes: int = 0
    packet_bytes: int = 0

    def add(self, topic: str, payload: bytes, qos: int) -> None:
        """Count one message."""
        self.messages += 1
        self.payload_bytes += len(payload)
        self.packet_bytes += packet_bytes(topic, payload, qos)
