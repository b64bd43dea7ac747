"""What fits a packet: the largest MQTT packet that the broker takes decides how large each frame may be.

Entries and pairs of a round frame, and entries of a reply, are as many as fit. Chunks are not: the protocol fixes where
a blob is cut (64 KiB). So a server does not start where a packet does not hold what no node can do without
(`server/run.py`), and offers no snapshot whose chunks do not fit.
"""

from meerkat_mq.core.path import Entry
from meerkat_mq.wire.frames import MAX_CHUNK_BYTES, MAX_FRAME_BYTES, encode, entry_bytes
from meerkat_mq.wire.messages import Round
from meerkat_mq.wire.topics import Topics

REPLY_BYTES = MAX_FRAME_BYTES // 2
LONGEST_ID = "n" * 64
_ENTRIES_BYTES = 30  # of a reply without entries
_CHUNK_BYTES = 56  # of a chunk without data
_PAIR_BYTES = 4


def packet_bytes(topic: str, payload: bytes, qos: int) -> int:
    """Size of an MQTT 3.1.1 PUBLISH packet: fixed header, topic, packet id (QoS 1), payload."""
    rest = 2 + len(topic.encode()) + (2 if qos else 0) + len(payload)
    return 1 + (1 if rest < 128 else 2 if rest < 16_384 else 3 if rest < 2_097_152 else 4) + rest


def largest_frame(limit: int, topics: Topics) -> int:
    """Bytes of the largest frame that a packet of `limit` bytes holds on every topic of a federation."""
    longest = (topics.reply(LONGEST_ID), topics.up(LONGEST_ID, "update"), topics.blob(bytes(16), 2**16 - 1))
    return min(MAX_FRAME_BYTES, limit - 3 - max(packet_bytes(topic, b"", 1) for topic in longest))


def reply_room(frame_bytes: int) -> int:
    """Bytes of entries in a reply, where frames have `frame_bytes` at most."""
    return min(REPLY_BYTES, frame_bytes - _ENTRIES_BYTES)


def chunks_fit(blob_bytes: int, frame_bytes: int) -> bool:
    """Whether frames of `frame_bytes` hold the chunks of a blob of so many bytes."""
    return min(blob_bytes, MAX_CHUNK_BYTES) + _CHUNK_BYTES <= frame_bytes


def round_room(frame: Round, entries: tuple[Entry, ...], frame_bytes: int) -> tuple[tuple[Entry, ...], int]:
    """The newest of some entries that a round frame has room for, and for how many pairs of `heard_before` then.

    Args:
        frame: without either.
        entries: at most so many as a frame of 96 KiB holds beside all that a round may say.
        frame_bytes: of the largest frame.
    """
    if frame_bytes >= MAX_FRAME_BYTES:
        return entries, 2**16 - 1
    room = frame_bytes - len(encode(frame))
    while entries and sum(map(entry_bytes, entries)) > room:
        entries = entries[1:]
    return entries, max(0, (room - sum(map(entry_bytes, entries)) - 2) // _PAIR_BYTES)
