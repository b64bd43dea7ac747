"""Golden vectors of the bytes on the wire, made with `meerkat_mq.wire`."""

import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass

import numpy as np
import zstandard

from meerkat_mq.core.directions import direction
from meerkat_mq.core.path import Coefficient, Displacement, Entry, digest, short_hash
from meerkat_mq.tasks.classification import Classification
from meerkat_mq.wire.arrays import encode_array, encode_mask, read_array, split
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import (
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
    decode,
    encode,
)
from meerkat_mq.wire.reader import Reader
from meerkat_mq.wire.snapshot import decode_snapshot, encode_snapshot
from protocol.vectors_core import RUN_ID, TOP_SEED, golden_entries, golden_mask, hex_float32, hex_u64, refusal, to_json

_TOP = 2**32 - 1
_MASK = golden_mask()
_ENTRIES = golden_entries(_MASK)[0]
_HEADER = Header(int.from_bytes(RUN_ID[:4], "little"), 3, 77, _MASK.hash[:8])
_HIGH = Header(_TOP, _TOP, _TOP, b"\xff" * 8)
_AGED = Entry(77, (Coefficient(1, 0, 2.0**-10, 3), Coefficient(0, 9, -(2.0**-9))), bytes(range(16)), bytes(16))
_DISPLACED = Entry(78, (), bytes(range(16)), bytes(range(16, 32)), Displacement(bytes(range(32, 48)), 1_250_000))
_BOTH = Entry(79, (Coefficient(0, 0, 0.5, 79),), bytes(16), bytes(16), Displacement(b"\xff" * 16, _TOP))
_BASE = bytes.fromhex("00112233445566ff")


def meaning(value: object) -> object:
    """A frame, or a part of it, as JSON: bytes as hex, sets as ascending lists, seeds as hex, NaN and ∞ as words."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple):
        return [meaning(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if is_dataclass(value):
        return {field.name: _field(field.name, getattr(value, field.name)) for field in fields(value)}
    return int(value) if isinstance(value, Reason) else value


def _field(name: str, value: object) -> object:
    if name == "seeds" and isinstance(value, tuple):
        return [hex_u64(seed) for seed in value]
    return meaning(value)


def _f(value: float) -> float:
    return float(np.float32(value))


def golden_frames() -> dict[str, Frame]:
    """Every frame type, several of each."""
    many = tuple(direction("mk1", 1, 0, 10).tolist())
    short = ((2, 1), (9, 4), (65535, 9))
    chunks = split(_HEADER, bytes(range(16)), bytes(range(256)) * 2)
    return {
        "update, T = 1": Update(_HEADER, 0xDEADBEEF, _BASE, _f(1.386), (_f(-0.731),)),
        "update, T = 10": Update(_HEADER, 1, _BASE, _f(0.25), many),
        "update, explicit seeds": Update(_HEADER, 0, _BASE, 0.0, many[:3], (0, 1, TOP_SEED)),
        "update, edge values": Update(_HIGH, _TOP, bytes(8), _f(3.4028234663852886e38), (-0.0, _f(1e-45), _f(-1e38))),
        "update, not finite": Update(_HEADER, 1, _BASE, math.nan, (math.nan, math.inf, -math.inf, _f(0.5))),
        "update, loss infinite": Update(_HEADER, 1, _BASE, math.inf, (_f(0.5),)),
        "update, values": Update(_HEADER, 7, _BASE, _f(0.5), (), values=Values(bytes(range(16)), 1_250_000, 10)),
        "update, values, edge values": Update(_HIGH, 7, _BASE, math.nan, (), values=Values(b"\xff" * 16, _TOP, 1000)),
        "round, idle": Round(_HEADER, False, 1, 1, _f(1e-3), 0),
        "round, open, nobody heard": Round(_HEADER, True, 1, 2, _f(1e-3), 30_000, 0, frozenset(range(10))),
        "round, all fields": Round(
            _HEADER, True, 10, 8, _f(1e-3), 60_000, 3, frozenset({0, 3, 7, 8, 21}), frozenset({3, 21}),
            ((3, 1), (8, 9)), _ENTRIES,
        ),
        "round, all but one early-stopped": Round(
            _HEADER, True, 100, 1, _f(1e-3), 600_000, 0, frozenset(range(9)), frozenset({2}),
            tuple((slot, 1) for slot in range(1, 9)),
        ),
        "round, heard beyond asked": Round(_HEADER, True, 1, 1, _f(1e-3), 1, 1, frozenset({0}), frozenset({17})),
        "round, edge values": Round(
            _HIGH, True, 1000, 4096, _f(1e-45), _TOP, 65535, frozenset({255}), frozenset(), short
        ),
        "round, buffered": Round(
            _HEADER, True, 10, 1, _f(1e-3), 60_000, 0, frozenset(range(6)), frozenset({4}), ((1, 3),),
            (_AGED, _DISPLACED), ((0, 1), (3, 20), (5, 1000)),
        ),
        "want a welcome": Want(_HEADER, 5, welcome=True),
        "want entries": Want(_HEADER, 5, entries_from=0),
        "want chunks": Want(_HEADER, 5, blob=_MASK.hash, chunks=(0, 2, 65535)),
        "want everything": Want(_HIGH, _TOP, True, _TOP, _MASK.hash, (1,)),
        "welcome": Welcome(_HEADER, 0xDEADBEEF, 3),
        "welcome, last slot": Welcome(_HIGH, _TOP, 65535),
        "entries": Entries(_HEADER, _ENTRIES),
        "entries, none": Entries(_HEADER, ()),
        "entries, aged and displaced": Entries(_HEADER, (_AGED, _DISPLACED, _BOTH)),
        "chunk": chunks[0],
        "chunk, second of two": Chunk(_HEADER, _MASK.hash, 1, 2, 65_537, b"\x2a"),
        "offer": Offer(_HEADER, 500, bytes(range(16)), 3_408_939),
        "offer, largest": Offer(_HIGH, _TOP, b"\xff" * 16, _TOP),
        **{f"refusal, {reason.name.lower()}": Refusal(_HEADER, 9, reason) for reason in Reason},
    }  # fmt: skip


def _sealed(data: bytes) -> bytes:
    return data + struct.pack("<I", zlib.crc32(data))


def _patched(frame: str, offset: int, data: bytes) -> bytes:
    """The golden frame with bytes of its body (or header, offset < 0 counts from its start) replaced, CRC made anew."""
    good = encode(golden_frames()[frame])[:-4]
    at = 24 + offset
    return _sealed(good[:at] + data + good[at + len(data) :])


def hostile_frames() -> dict[str, bytes]:
    """Frames that every implementation refuses."""
    update = encode(golden_frames()["update, T = 1"])
    nan, infinite, other_nan, negative_nan = b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\1\0\x80\x7f", b"\0\0\xc0\xff"
    return {
        "empty": b"",
        "header cut short": update[:23],
        "no room for the CRC": b"XK" + update[2:26],
        "cut short": update[:-1],
        "one byte too many": update + b"\0",
        "one bit flipped": update[:30] + bytes([update[30] ^ 1]) + update[31:],
        "another magic": b"XK" + update[2:],
        "another version": _patched("update, T = 1", -22, b"\2"),
        "type 0": _patched("update, T = 1", -21, b"\0"),
        "type 9": _patched("update, T = 1", -21, b"\x09"),
        "over 96 KiB": bytes(96 * 1024 + 1),
        "body one byte too long": _sealed(update[:-4] + b"\0"),
        "body one byte too short": _sealed(update[:-5]),
        "update, no steps": _patched("update, T = 1", 12, b"\0\0"),
        "update, 1001 steps": _patched("update, T = 1", 12, (1001).to_bytes(2, "little")),
        "update, unknown flag": _patched("update, T = 1", 14, b"\4\0"),
        "update, seeds and values": _patched("update, values", 14, b"\3\0"),
        "update, values of no bytes": _patched("update, values", 36, bytes(4)),
        "update, values of no steps": _patched("update, values", 12, b"\0\0"),
        "update, another NaN as the loss": _patched("update, T = 1", 16, negative_nan),
        "update, another NaN as g": _patched("update, T = 1", 20, other_nan),
        "round, no steps": _patched("round, idle", 0, b"\0\0"),
        "round, no lanes": _patched("round, idle", 2, b"\0\0"),
        "round, 4097 lanes": _patched("round, idle", 2, b"\x01\x10"),
        "round, eps not a number": _patched("round, idle", 4, nan),
        "round, eps infinite": _patched("round, idle", 4, infinite),
        "round, eps 0": _patched("round, idle", 4, bytes(4)),
        "round, unknown flag": _patched("round, idle", 14, b"\x80\0"),
        "round, bitmap of 8193 bytes": _patched("round, idle", 16, b"\x01\x20"),
        "round, bitmap longer than its last slot": _patched("round, open, nobody heard", 23, b"\0"),
        "round, short list not ascending": _patched("round, all fields", 28, b"\x08\0\1\0\x08\0"),
        "round, short node does all steps": _patched("round, all fields", 30, b"\x0a\0"),
        "round, nobody heard before": _sealed(_patched("round, idle", 14, b"\2\0")[:-4] + b"\0\0"),
        "round, heard before and now": _patched("round, buffered", 34, b"\4\0"),
        "round, heard before, not ascending": _patched("round, buffered", 34, b"\0\0"),
        "round, heard before at age 0": _patched("round, buffered", 32, b"\0\0"),
        "round, heard before at age 1001": _patched("round, buffered", 40, b"\xe9\3"),
        "want, unknown flag": _patched("want a welcome", 4, b"\x08"),
        "want, chunks of number 0": _patched("want chunks", 21, b"\0\0"),
        "entries, coefficient not finite": _patched("entries", 12, nan),
        "entries, more terms than the limit": _patched("entries", 6, b"\xff\x3f"),
        "entries, more aged terms than the limit": _patched("entries, aged and displaced", 6, b"\x81\xa5"),
        "entries, ages of 0": _patched("entries, aged and displaced", 8, bytes(2)),
        "entries, an age above 1000": _patched("entries, aged and displaced", 8, b"\xe9\3"),
        "entries, an age above the version": _patched("entries, aged and displaced", 8, b"\x4e\0"),
        "entries, a displacement of no bytes": _patched("entries, aged and displaced", 82, bytes(4)),
        "chunk, index beyond count": _patched("chunk", 16, b"\1\0"),
        "chunk, longer than its blob": _patched("chunk", 20, b"\1\0\0\0"),
        "chunk, of no bytes": _sealed(_patched("chunk, second of two", 24, bytes(4))[:-5]),
        "offer, of no bytes": _patched("offer", 20, bytes(4)),
        "offer, cut short": _sealed(encode(golden_frames()["offer"])[:-5]),
        "refusal, reason 0": _patched("refusal, resynchronise", 4, b"\0"),
        "refusal, unknown reason": _patched("refusal, resynchronise", 4, b"\x06"),
    }


def frames() -> bytes:
    """Frames with their meaning, and bytes to refuse."""
    good = [{"name": name, "hex": encode(f).hex(), "type": type(f).__name__.lower(), "meaning": meaning(f)}
            for name, f in golden_frames().items()]  # fmt: skip
    refused = [
        {"name": name, "error": refusal(decode, data), "hex": data.hex() if len(data) < 5000 else f"00*{len(data)}"}
        for name, data in hostile_frames().items()
    ]
    return to_json({"frames": good, "refused": refused})


def mask_blob() -> bytes:
    """The golden mask as a blob."""
    return encode_mask(_MASK)


def snapshot_blob() -> bytes:
    """theta at the end of the golden run, as a blob."""
    entries, theta = golden_entries(_MASK)
    return encode_snapshot(RUN_ID, len(entries), entries[-1].hash(RUN_ID), theta)


def _hostile_snapshots() -> dict[str, bytes]:
    good = snapshot_blob()
    return {
        "empty": b"",
        "another magic": b"MKDIFF" + good[6:],
        "another format version": good[:6] + b"\2" + good[7:],
        "another number of weights": good[:60] + struct.pack("<I", _MASK.size + 1) + good[64:],
        "another digest": good[:44] + bytes([good[44] ^ 1]) + good[45:],
        "an array of another type": good[:64] + b"\2" + good[65:],
        "cut short": good[:-1],
        "one byte too many": good + b"\0",
    }


def snapshot() -> bytes:
    """What the golden snapshot says, and blobs to refuse though their hashes are right."""
    blob, (entries, theta) = snapshot_blob(), golden_entries(_MASK)
    refused = [
        {
            "name": name,
            "error": refusal(lambda data: decode_snapshot(data, short_hash(data), _MASK.size), data),
            "hex": data.hex(),
        }
        for name, data in _hostile_snapshots().items()
    ]
    return to_json(
        {
            "hash": short_hash(blob).hex(),
            "run_id": RUN_ID.hex(),
            "version": len(entries),
            "head": entries[-1].hash(RUN_ID).hex(),
            "digest": digest(theta).hex(),
            "theta": hex_float32(theta),
            "refused": refused,
        }
    )


def golden_arrays() -> dict[str, np.ndarray[tuple[int], np.dtype[np.generic]]]:
    """One array a dtype, and edge cases."""
    return {
        "float32": direction("mk1", 21, 0, 50),
        "float32, one value": np.array([-0.0], np.float32),
        "uint32": np.array([0, 1, 255, 256, 65_536, _TOP], np.uint32),
        "uint32, compressible": np.arange(300, dtype=np.uint32),
        "uint16": np.array([0, 1, 0x1234, 65_535], np.uint16),
    }


def _hostile_arrays() -> dict[str, bytes]:
    good = encode_array(golden_arrays()["uint32"])
    packed = good[9:]
    short = zstandard.ZstdCompressor().compress(bytes(8))
    fewer, more = (_mislabelled(bytes(range(size)), 24) for size in (16, 32))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(24))
    skippable = struct.pack("<II", 0x184D2A50, 24) + bytes(24)
    return {
        "cut short": good[:-1],
        "unknown dtype": b"\x09" + good[1:],
        "another dtype": b"\x01" + good[1:],
        "another count": good[:1] + struct.pack("<I", 7) + good[5:],
        "not zstd": good[:9] + bytes(len(packed)),
        "zstd of fewer bytes": struct.pack("<BII", 2, 6, len(short)) + short,
        "zstd of fewer bytes than it says": struct.pack("<BII", 2, 6, len(fewer)) + fewer,
        "zstd of more bytes than it says": struct.pack("<BII", 2, 6, len(more)) + more,
        "zstd without its size": struct.pack("<BII", 2, 6, len(unsized)) + unsized,
        "fewer bytes than any zstd frame of this size": good[:5] + bytes(4),
        "a skippable frame": struct.pack("<BII", 2, 6, len(skippable)) + skippable,
        "bytes after the zstd frame": struct.pack("<BII", 2, 6, len(packed) + 1) + packed + b"\0",
    }


def _mislabelled(content: bytes, size: int) -> bytes:
    """A zstd frame that says that it is of another size, below 256 as it is."""
    frame = zstandard.ZstdCompressor().compress(content)
    return frame[:5] + bytes([size]) + frame[6:]


def arrays() -> bytes:
    """Arrays, and bytes that are not the array of six uint32 that they should be."""
    good = [
        {
            "name": name,
            "dtype": str(array.dtype),
            "count": array.size,
            "values": array.tobytes().hex(),
            "encoded": encode_array(array).hex(),
        }
        for name, array in golden_arrays().items()
    ]
    refused = [
        {"name": name, "error": refusal(lambda data: read_array(Reader(data), "<u4", 6), data), "hex": data.hex()}
        for name, data in _hostile_arrays().items()
    ]
    return to_json({"arrays": good, "refused": refused})


def control() -> bytes:
    """JSON messages of the control plane."""
    task = Classification(
        name="sst2",
        fields=("sentence",),
        template="{sentence} It was",
        label_words=(" terrible", " great"),
        text="{sentence}",
        descriptions=("a negative review", "a positive review"),
    )
    toy = RunDescriptor(
        federation="plant-7", run=RUN_ID.hex(), engine="toy", model="toy", dtype="float32",
        fingerprint=_MASK.fingerprint.hex(), tokenizer=_MASK.tokenizer_fingerprint.hex(), mask=_MASK.hash.hex(),
        mask_bytes=323, mask_chunks=1, weights=_MASK.size, stream="mk1", rounds=100, local_steps=1,
        directions=2, lr=3e-4, eps=1e-3, batch_size=16, digest_every=1,
    )  # fmt: skip
    run, server = RUN_ID.hex(), "0123456789abcdef"
    messages = [
        toy,
        toy.model_copy(update={"engine": "transformers", "task": task.describe(), "model": "TinyLlama"}),
        toy.model_copy(update={"dtype": "float16", "local_steps": 100, "perturbations": 10}),
        toy.model_copy(update={"mode": "buffered", "max_staleness": 20, "values": True}),
        toy.model_copy(update={"max_step": 2.140484708207958}),
        toy.model_copy(update={"completion": _MASK.fingerprint.hex()}),
        ServerState(status="online", run=run, term=1, server_id=server, link=7, host="hub", round=12, nodes=8),
        ServerState(status="lost", run=run, term=_TOP, server_id=server, link=_TOP, host="hub", round=12),
        NodeStatus(status="online", boot=1, link=2, host="pump-3", run=run, rows=800),
        NodeStatus(status="stopped", boot=_TOP, link=0, host=""),
        NodeStatus(status="asleep", boot=1, link=2, host="pump-3", rows=800, version=12, digest=run, wakes_in_s=900),
        NodeStatus(status="starting", boot=1, link=2, host="pump-3", refuses="policy: eps = 0.001 is below min_eps"),
        NodeStatus(status="online", boot=1, link=2, host="pump-3", run=run, rows=800, signal=1.25),
    ]
    junk = ["", "null", "{", "[]", '{"status":"online"}', '{"status":"online","boot":"1","link":2,"host":""}',
            '{"status":"online","boot":1,"link":2,"host":"","extra":0}', '{"status":"up","boot":1,"link":2,"host":""}',
            '{"status":"online","boot":4294967296,"link":2,"host":""}',
            '{"status":"asleep","boot":1,"link":2,"host":""}',
            '{"status":"online","boot":1,"link":2,"host":"","wakes_in_s":9}']  # fmt: skip
    for text in junk:
        refusal(lambda data: decode_control(data, NodeStatus), text.encode())
    return to_json(
        {
            "messages": [{"kind": type(m).__name__, "json": m.encode().decode()} for m in messages],
            "refused_as_node_status": junk,
        }
    )


FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "frames.json": ("frames with their meaning, and bytes to refuse (section 4)", frames),
    "arrays.json": ("arrays, and bytes to refuse (section 5)", arrays),
    "mask.blob": ("mask.bin as a blob (section 5); zstd versions may write other bytes", mask_blob),
    "snapshot.blob": ("theta at the end of path.json's first run (section 5); likewise", snapshot_blob),
    "snapshot.json": ("what snapshot.blob says, its hash, and blobs to refuse (section 5)", snapshot),
    "control.json": ("JSON control messages, and texts to refuse as NodeStatus (section 6)", control),
}
