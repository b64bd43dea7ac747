"""Whatever packet the broker takes, frames fit it."""

from dataclasses import replace

import pytest

from meerkat_mq.core.path import Coefficient, Entry
from meerkat_mq.wire.arrays import split
from meerkat_mq.wire.frames import MAX_FRAME_BYTES, decode, encode, entry_bytes
from meerkat_mq.wire.limits import (
    LONGEST_ID,
    REPLY_BYTES,
    chunks_fit,
    largest_frame,
    packet_bytes,
    reply_room,
    round_room,
)
from meerkat_mq.wire.messages import Entries, Header, Round
from meerkat_mq.wire.topics import Topics

HEADER = Header(1, 2, 3, bytes(8))


def entry(version: int, terms: int = 2) -> Entry:
    return Entry(version, (Coefficient(0, 0, 0.5),) * terms, bytes(16), bytes(16))


@pytest.mark.parametrize("federation", ["f", "f" * 64])
@pytest.mark.parametrize("limit", [1024, 4096, 16_384, 65_536, 98_304, 131_072, 2**28 - 1])
def test_the_largest_frame_fits_a_packet_on_every_topic(federation: str, limit: int) -> None:
    topics = Topics(federation)
    frame = bytes(largest_frame(limit, topics))
    assert 800 < len(frame) <= MAX_FRAME_BYTES
    longest = (topics.round, topics.values, topics.reply(LONGEST_ID), topics.blob(bytes(16), 65_535))
    sizes = [packet_bytes(topic, frame, 1) for topic in (*longest, topics.up(LONGEST_ID, "update"))]
    assert max(sizes) <= limit
    assert len(frame) == MAX_FRAME_BYTES or max(sizes) >= limit - 3


@pytest.mark.parametrize("frame_bytes", [850, 4000, 49_000, MAX_FRAME_BYTES])
def test_a_reply_of_as_many_entries_as_fit_is_a_frame(frame_bytes: int) -> None:
    room = reply_room(frame_bytes)
    count = room // entry_bytes(entry(0))
    encoded = encode(Entries(HEADER, tuple(map(entry, range(count)))))
    assert room <= REPLY_BYTES
    assert len(encoded) <= frame_bytes
    assert len(encoded) > min(frame_bytes, REPLY_BYTES) - entry_bytes(entry(0))


@pytest.mark.parametrize("size", [1, 1000, 65_536, 65_537, 200_000])
def test_chunks_fit_where_their_largest_does(size: int) -> None:
    largest = max(len(encode(chunk)) for chunk in split(HEADER, bytes(16), bytes(size)))
    assert chunks_fit(size, largest)
    assert not chunks_fit(size, largest - 1)


@pytest.mark.parametrize("frame_bytes", [*range(90, 400, 7), 4000])
def test_a_round_holds_the_newest_entries_that_fit_and_then_pairs(frame_bytes: int) -> None:
    bare = Round(HEADER, True, 2, 1, 1.0, 1000, asked=frozenset({9}), short=((9, 1),))
    entries, pairs = round_room(bare, tuple(map(entry, range(5))), frame_bytes)
    assert entries == tuple(map(entry, range(5)))[5 - len(entries) :]
    before = tuple((slot, 1) for slot in range(100, 100 + min(pairs, 1000)))
    whole = replace(bare, entries=entries, heard_before=before)
    assert decode(encode(whole)) == whole
    assert len(encode(whole)) <= frame_bytes
    assert len(entries) == 5 or len(encode(whole)) + entry_bytes(entry(0)) > frame_bytes
