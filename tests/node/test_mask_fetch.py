"""Getting the mask by `want`, chunk by chunk, from a server in miniature."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.errors import BadValue, TooLarge
from meerkat_mq.mqtt import blob_fetch
from meerkat_mq.mqtt.blob_fetch import CHUNKS_A_WANT, BlobFetch
from meerkat_mq.node.mask_fetch import check_descriptor, fetch_mask
from meerkat_mq.node.state import NodeState
from meerkat_mq.wire.arrays import encode_mask, split
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import Chunk, Header
from meerkat_mq.wire.topics import Topics

TOPICS = Topics("f")


def big_mask() -> Mask:
    """Of noise, so that it fills more chunks than one `want` asks for."""
    rng = np.random.default_rng(0)
    size = 260_000
    noise = [rng.standard_normal(size).astype(np.float32) for _ in range(2)]
    indices = np.sort(rng.choice(2**24, size, replace=False)).astype(np.uint32)
    return Mask((MaskedMatrix("m", (2**12, 2**12), indices, *noise),), bytes(32), bytes(32))


def descriptor(mask: Mask, **changes: object) -> RunDescriptor:
    blob = encode_mask(mask)
    settings = {
        "federation": "f", "run": "1" * 32, "engine": "toy", "model": "", "dtype": "float32",
        "fingerprint": "0" * 64, "tokenizer": "0" * 64, "mask": mask.hash.hex(), "mask_bytes": len(blob),
        "mask_chunks": -(-len(blob) // 65536), "weights": mask.size, "stream": "mk1", "rounds": 1, "local_steps": 1,
        "directions": 1, "lr": 0.1, "eps": 0.1, "batch_size": 1, "digest_every": 1,
    }  # fmt: skip
    return RunDescriptor.model_validate(settings | changes)


class Server:
    """Answers wants at once; stands where the fetch expects a session."""

    def __init__(self, mask: Mask, spoil: Callable[[Chunk], Chunk | None] = lambda chunk: chunk) -> None:
        self.wants: list[tuple[int, ...]] = []
        self.filters: list[str] = []
        self.descriptor = descriptor(mask)
        self._spoil = spoil
        self._chunks = split(Header(0, 0, 0, bytes(8)), mask.hash, encode_mask(mask))
        self._fetch: BlobFetch | None = None

    async def fetch(self, folder: Path) -> Mask:
        with NodeState(folder) as state:
            return await fetch_mask(self.descriptor, state, self, TOPICS, self._begin)  # type: ignore[arg-type]

    def _begin(self, name: bytes, size: int) -> BlobFetch:
        self._fetch = BlobFetch(name, size, self._answer)
        return self._fetch

    def _answer(self, chunks: tuple[int, ...]) -> None:
        assert self._fetch is not None
        self.wants.append(chunks)
        for index in chunks:
            if (chunk := self._spoil(self._chunks[index])) is not None:
                self._fetch.add(chunk)

    def subscribe(self, topic: str) -> None:
        self.filters.append(topic)

    def unsubscribe(self, topic: str) -> None:
        self.filters.remove(topic)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob_fetch, "PATIENCE_S", 0.05)


async def test_all_chunks_come_by_want_without_a_pause_between(tmp_path: Path) -> None:
    mask = big_mask()
    server = Server(mask)
    assert (await server.fetch(tmp_path)).hash == mask.hash
    count = server.descriptor.mask_chunks
    first, *others = server.wants
    assert first == (count - 1,)  # one alone, after a silence in which none came from the broker
    assert [want[0] for want in others] == list(range(0, count - 1, CHUNKS_A_WANT))
    assert len(others) >= 2
    assert server.filters == []
    again = Server(mask)
    assert (await again.fetch(tmp_path)).hash == mask.hash
    assert again.wants == []


async def test_chunks_that_get_lost_are_asked_for_again(tmp_path: Path) -> None:
    lost = {0, 3, 20}

    def lose(chunk: Chunk) -> Chunk | None:
        if chunk.index not in lost:
            return chunk
        lost.remove(chunk.index)
        return None

    server = Server(big_mask(), lose)
    assert (await server.fetch(tmp_path)).hash == server.descriptor.mask_hash
    assert not lost


async def test_a_mask_that_does_not_fit_its_hash_is_fetched_again(tmp_path: Path) -> None:
    spoiled: list[int] = []

    def spoil(chunk: Chunk) -> Chunk:
        if chunk.index != 5 or spoiled:
            return chunk
        spoiled.append(chunk.index)
        return Chunk(chunk.header, chunk.blob, chunk.index, chunk.count, chunk.size, bytes(len(chunk.data)))

    server = Server(big_mask(), spoil)
    assert (await server.fetch(tmp_path)).hash == server.descriptor.mask_hash
    assert spoiled


async def test_a_damaged_kept_mask_is_fetched_again(tmp_path: Path) -> None:
    server = Server(big_mask())
    (tmp_path / f"mask-{server.descriptor.mask}.mkm").write_bytes(b"MKMASK")
    assert (await server.fetch(tmp_path)).hash == server.descriptor.mask_hash
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
