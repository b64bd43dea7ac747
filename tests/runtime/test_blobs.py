"""Blobs of one run: displacements that come unasked, in bounded memory."""

import pytest

from meerkat_mq.core.path import short_hash
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.runtime.blobs import MOST_PUSHED, Blobs
from meerkat_mq.runtime.steps import Sequence
from meerkat_mq.wire.arrays import split
from meerkat_mq.wire.messages import Chunk, Header
from meerkat_mq.wire.values import largest_blob
from tests.runtime.one_node import descriptor
from tests.runtime.ports import VirtualClock

WEIGHTS = 40_000  # more than one chunk, in float32


def test_of_displacements_that_come_unasked_the_newest_are_kept() -> None:
    run = descriptor(toy_mask(WEIGHTS), values=True)
    blobs = Blobs(run, 1, lambda frame: pytest.fail("asked"), VirtualClock())
    header = Header.of(run.run_id, 1, 0, run.mask_hash)
    size = 2 * 65536 + 1
    whole = [bytes([number]) * size for number in range(5)]
    for parts in zip(*(split(header, short_hash(blob), blob) for blob in whole[:3]), strict=True):
        for chunk in parts:  # one of each in turn
            blobs.take_pushed(chunk)
    for blob in whole[3:]:
        for chunk in split(header, short_hash(blob), blob):
            blobs.take_pushed(chunk)
    names = [short_hash(blob) for blob in whole]
    count = 2 * largest_blob(WEIGHTS) // size
    assert [blobs.comes_unasked(name) for name in names] == [number >= 5 - count for number in range(5)]
    found: list[bytes] = []
    Sequence(blobs.begin(names[-count], size).collect(unasked=True), found.append)
    assert found == [whole[-count]]
    for number in range(1000):
        blobs.take_pushed(Chunk(header, short_hash(b"%d" % number), 0, 1, 1, b"1"))
    assert not blobs.comes_unasked(names[-1])
    assert sum(blobs.comes_unasked(short_hash(b"%d" % number)) for number in range(1000)) == MOST_PUSHED
