import struct

import pytest

from meerkat_mq.errors import Truncated
from meerkat_mq.wire.reader import Reader


def test_reads_forward_and_ends() -> None:
    reader = Reader(b"\x01\x02\x00\x03\x00\xaa\xbb")
    assert reader.unpack(struct.Struct("<B")) == (1,)
    assert reader.numbers("H", 2) == (2, 3)
    assert reader.left == 2
    reader.trim(1)
    assert bytes(reader.take(1)) == b"\xaa"
    reader.end()


def test_every_read_is_bounded() -> None:
    reader = Reader(b"\x01\x02")
    for read in (
        lambda: reader.take(3),
        lambda: reader.unpack(struct.Struct("<I")),
        lambda: reader.numbers("Q", 10**6),
    ):
        with pytest.raises(Truncated, match="early"):
            read()
    with pytest.raises(Truncated, match="2 bytes too many"):
        reader.end()
