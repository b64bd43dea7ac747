"""Damaged bytes for every decoder: a value, or an error of ours; soon, and without memory that stays."""

import gc
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from meerkat_mq.config import Codec
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Coefficient, Displacement, Entry, short_hash
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.errors import MeerkatError
from meerkat_mq.node.state import decode_update, encode_update
from meerkat_mq.runtime.join import check_descriptor
from meerkat_mq.runtime.model import KeptUpdate
from meerkat_mq.wire import snapshot
from meerkat_mq.wire.arrays import decode_mask, encode_mask
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.entries import decode_entry
from meerkat_mq.wire.frames import decode, encode, encode_entry
from meerkat_mq.wire.messages import (
    Chunk,
    Entries,
    Frame,
    Header,
    Offer,
    Reason,
    Refusal,
    Round,
    Update,
    Values,
    Want,
    Welcome,
)
from meerkat_mq.wire.snapshot import Difference, decode_snapshot, encode_snapshot
from meerkat_mq.wire.values import decode_values, encode_values
from tests.fuzz.mutate_bytes import INPUTS, damaged
from tests.runtime.one_node import descriptor
from tests.support.resident import resident_mib

WEIGHTS = 300
GROWTH_MIB = 20.0
SLOWEST_S = 2.0  # of CPU, for one input

MASK = toy_mask(WEIGHTS)
RUN = descriptor(MASK)
HEADER = Header.of(RUN.run_id, 1, 3, RUN.mask_hash)
DISPLACED = Displacement(bytes(range(16)), 999)
ENTRY = Entry(2, (Coefficient(0, 0, 0.5), Coefficient(1, 2, -1.5, 1)), bytes(16), bytes(range(16)), DISPLACED)
THETA = np.linspace(-1, 1, WEIGHTS, dtype=np.float32)
FRAMES: tuple[Frame, ...] = (
    Update(HEADER, 7, bytes(8), 0.5, (1.0, -2.5)),
    Update(HEADER, 7, bytes(8), 0.5, (1.0,), seeds=(2**63,)),
    Update(HEADER, 7, bytes(8), 0.5, (), values=Values(bytes(16), 999, 3)),
    Want(HEADER, 7, welcome=True, entries_from=3, blob=bytes(16), chunks=(0, 5, 9)),
    Chunk(HEADER, bytes(16), 0, 1, 3, b"abc"),
    Round(
        HEADER, True, 2, 2, 0.5, 1000, asked=frozenset({0, 9, 70}), heard=frozenset({9}), short=((9, 1),),
        heard_before=((70, 1),), entries=(replace(ENTRY, version=1), ENTRY),
    ),
    Welcome(HEADER, 7, 5),
    Entries(HEADER, (ENTRY,)),
    Offer(HEADER, 50, bytes(16), 1000),
    Refusal(HEADER, 7, Reason.RESYNCHRONISE),
)  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """What is damaged, and who reads it."""

    samples: tuple[bytes, ...]
    read: Callable[[bytes], object]
    text: bool = False


def _difference(folder: Path) -> bytes:
    Difference(MASK, THETA, RUN.run_id, 3).save(folder)
    return folder.read_bytes()


def _run(data: bytes) -> None:
    check_descriptor(decode_control(data, RunDescriptor), "f")


def decoders(folder: Path) -> dict[str, Decoder]:
    """All of them."""
    codecs: tuple[Codec, ...] = ("float32", "bfloat16", "int8")
    status = NodeStatus(status="asleep", boot=7, link=1, host="h", run=RUN.run, rows=3, wakes_in_s=5)
    state = ServerState(status="online", run=RUN.run, term=1, server_id="0" * 16, link=1, host="hub", round=0)
    kept = KeptUpdate(Update(HEADER, 7, bytes(8), 0.5, (1.0,)))
    return {
        "frame": Decoder(tuple(map(encode, FRAMES)), decode),
        "entry": Decoder((encode_entry(ENTRY),), decode_entry),
        "server state": Decoder((state.encode(),), lambda data: decode_control(data, ServerState), text=True),
        "node status": Decoder((status.encode(),), lambda data: decode_control(data, NodeStatus), text=True),
        "run": Decoder((RUN.encode(),), _run, text=True),
        "mask": Decoder((encode_mask(MASK),), lambda data: decode_mask(data, MASK.hash, WEIGHTS)),
        "mask file": Decoder((MASK.to_bytes(),), Mask.from_bytes),
        "snapshot": Decoder(
            (encode_snapshot(RUN.run_id, 3, bytes(16), THETA),),
            lambda data: decode_snapshot(data, short_hash(data), WEIGHTS),
        ),
        "values": Decoder(
            tuple(encode_values(THETA, codec) for codec in codecs),
            lambda data: decode_values(data, short_hash(data), WEIGHTS),
        ),
        "difference": Decoder((_difference(folder / "d.mkd"),), snapshot._decode),
        "kept update": Decoder((encode_update(RUN, kept),), lambda data: decode_update(data, RUN)),
    }


NAMES = (
    "frame", "entry", "server state", "node status", "run", "mask", "mask file", "snapshot", "values", "difference",
    "kept update",
)  # fmt: skip
EACH = -(-INPUTS // len(NAMES))


@pytest.mark.timeout(max(120, EACH / 200))
@pytest.mark.parametrize("name", NAMES)
def test_damaged_bytes_are_read_or_refused(name: str, tmp_path: Path) -> None:
    found = decoders(tmp_path)
    assert tuple(found) == NAMES
    decoder, said, before = found[name], Counter[str](), 0.0
    for sample in decoder.samples:
        decoder.read(sample)
    for number in range(EACH):
        if number == EACH // 10:
            gc.collect()
            before = resident_mib()
        data = damaged(name, decoder.samples, number, text=decoder.text)
        began = time.thread_time()
        try:
            decoder.read(data)
            said["read"] += 1
        except MeerkatError as error:
            said[type(error).__name__] += 1
        except Exception as error:
            raise AssertionError(f"{name}, mutant {number}: {data[:300]!r}") from error
        assert time.thread_time() - began < SLOWEST_S, f"{name}, mutant {number}"
    gc.collect()
    assert resident_mib() - before < GROWTH_MIB
    assert len(said) > 1
