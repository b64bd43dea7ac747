"""Getting the mask by `want`, chunk by chunk, from a server in miniature."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.errors import BadValue, TooLarge
from meerkat_mq.node.state import NodeState
from meerkat_mq.runtime.blobs import CHUNKS_A_WANT, PATIENCE_S
from meerkat_mq.runtime.join import check_descriptor
from meerkat_mq.runtime.model import NodeProfile
from meerkat_mq.wire.arrays import encode_mask, split
from meerkat_mq.wire.frames import decode, encode
from meerkat_mq.wire.messages import Chunk, Header, Want
from meerkat_mq.wire.topics import Topics
from tests.runtime.one_node import OneNode, descriptor
from tests.runtime.ports import Sent

TOPICS = Topics("f")


def big_mask() -> Mask:
    """Of noise, so that it fills more chunks than one `want` asks for."""
    rng = np.random.default_rng(0)
    size = 260_000
    noise = [rng.standard_normal(size).astype(np.float32) for _ in range(2)]
    indices = np.sort(rng.choice(2**24, size, replace=False)).astype(np.uint32)
    return Mask((MaskedMatrix("m", (2**12, 2**12), indices, *noise),), bytes(32), bytes(32))


class Server:
    """Answers wants at once.

    Attributes:
        wants: the chunks that each one asked for.
        node: which has fetched it.
    """

    def __init__(self, mask: Mask, spoil: Callable[[Chunk], Chunk | None] = lambda chunk: chunk) -> None:
        self.wants: list[tuple[int, ...]] = []
        self.descriptor = descriptor(mask)
        self._spoil = spoil
        self._chunks = split(Header(0, 0, 0, bytes(8)), mask.hash, encode_mask(mask))

    def fetch(self, folder: Path) -> Mask:
        """The mask that a node makes its model of, with this state folder."""
        with NodeState(folder) as state:
            self.node = OneNode(state, NodeProfile("node-0", "f"))
            self.node.transport.reaches = self._take
            self.node.driver.connected(1)
            self.node.receive(TOPICS.run, self.descriptor.encode(), retained=True)
            self.node.clock.until(lambda: self.node.machine_is_there, within_s=1000)
        (model,) = self.node.models
        return model.mask

    def _take(self, sent: Sent) -> None:
        if sent.topic == TOPICS.up("node-0", "want"):
            want = decode(sent.payload)
            assert isinstance(want, Want)
            if want.chunks:
                self.wants.append(want.chunks)
                self.node.clock.at(self.node.clock.now(), partial(self._answer, want.chunks))

    def _answer(self, chunks: tuple[int, ...]) -> None:
        for index in chunks:
            if (chunk := self._spoil(self._chunks[index])) is not None:
                self.node.driver.received(TOPICS.reply("node-0"), encode(chunk), retained=False)


def test_all_chunks_come_by_want_without_a_pause_between(tmp_path: Path) -> None:
    mask = big_mask()
    server = Server(mask)
    assert server.fetch(tmp_path).hash == mask.hash
    count = server.descriptor.mask_chunks
    first, *others = server.wants
    assert first == (count - 1,)  # one alone, after a silence in which none came from the broker
    assert [want[0] for want in others] == list(range(0, count - 1, CHUNKS_A_WANT))
    assert len(others) >= 2
    assert server.node.clock.now() == PATIENCE_S
    assert server.node.transport.filters == set()
    again = Server(mask)
    assert again.fetch(tmp_path).hash == mask.hash
    assert again.wants == []


def test_chunks_that_get_lost_are_asked_for_again(tmp_path: Path) -> None:
    lost = {0, 3, 20}

    def lose(chunk: Chunk) -> Chunk | None:
        if chunk.index not in lost:
            return chunk
        lost.remove(chunk.index)
        return None

    server = Server(big_mask(), lose)
    assert server.fetch(tmp_path).hash == server.descriptor.mask_hash
    assert not lost


def test_a_mask_that_does_not_fit_its_hash_is_fetched_again(tmp_path: Path) -> None:
    spoiled: list[int] = []

    def spoil(chunk: Chunk) -> Chunk:
        if chunk.index != 5 or spoiled:
            return chunk
        spoiled.append(chunk.index)
        return Chunk(chunk.header, chunk.blob, chunk.index, chunk.count, chunk.size, bytes(len(chunk.data)))

    server = Server(big_mask(), spoil)
    assert server.fetch(tmp_path).hash == server.descriptor.mask_hash
    assert spoiled


def test_a_damaged_kept_mask_is_fetched_again(tmp_path: Path) -> None:
    server = Server(big_mask())
    (tmp_path / f"mask-{server.descriptor.mask}.mkm").write_bytes(b"MKMASK")
    assert server.fetch(tmp_path).hash == server.descriptor.mask_hash
    assert server.wants


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"federation": "g"}, BadValue),
        ({"engine": "transformers"}, BadValue),
        ({"mask_bytes": 2**31, "mask_chunks": 2**15}, BadValue),
        ({"mask_chunks": 7}, TooLarge),
        ({"mask_bytes": 0}, TooLarge),
    ],
)
def test_descriptors_that_no_server_means_are_refused(changes: dict[str, object], error: type[Exception]) -> None:
    mask = big_mask()
    check_descriptor(descriptor(mask), "f")
    with pytest.raises(error):
        check_descriptor(descriptor(mask, **changes), "f")
