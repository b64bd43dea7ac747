"""Frames and arrays (SPECIFICATION.md, section 4). A frame is a pair (type, meaning), as in golden/frames.json."""

import math
import struct
import zlib
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from protocol.reference.core import Refused, blob_bytes, is_aged, terms_and_displacement

Meaning = dict[str, Any]

HEADER = "<2sBBIII8s"


class Bytes:
    """Reads forward."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > len(self.data):
            raise Refused("Truncated")
        part, self.data = self.data[:count], self.data[count:]
        return part

    def read(self, layout: str) -> tuple[Any, ...]:
        """The next numbers."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))


def need(holds: bool, name: str = "BadValue") -> None:
    """Refuse where it does not hold."""
    if not holds:
        raise Refused(name)


def decode(data: bytes) -> tuple[str, Meaning]:
    """Type and meaning of a frame."""
    need(len(data) <= 96 * 1024, "TooLarge")
    need(len(data) >= 28, "Truncated")
    body = Bytes(data)
    magic, version, number, run, term, theta, mask = body.read(HEADER)
    need(magic == b"MK", "BadMagic")
    need(version == 1, "UnknownVersion")
    need(1 <= number <= 8, "UnknownType")
    body.data, crc = body.data[:-4], body.data[-4:]
    need(zlib.crc32(data[:-4]) == int.from_bytes(crc, "little"), "BadChecksum")
    kind, (decode_body, _) = list(CODECS.items())[number - 1]
    header = {"run": run, "term": term, "version": theta, "mask": mask.hex()}
    meaning = {"header": header, **decode_body(body)}
    need(not body.data, "Truncated")
    return kind, meaning


def encode(kind: str, meaning: Meaning) -> bytes:
    """A frame's bytes."""
    h = meaning["header"]
    head = (b"MK", 1, list(CODECS).index(kind) + 1, h["run"], h["term"], h["version"], bytes.fromhex(h["mask"]))
    data = struct.pack(HEADER, *head) + CODECS[kind][1](meaning)
    return data + struct.pack("<I", zlib.crc32(data))


def decode_update(body: Bytes) -> Meaning:
    """boot, base digest, count, flags, loss; then a displacement if flag 2, or seeds if flag 1 and scalars."""
    boot, base, count, flags, loss = body.read("<I8sHH4s")
    need(flags < 4, "UnknownFlags")
    need(1 <= count <= 1000 and flags != 3)
    meaning = {"boot": boot, "base": base.hex(), "loss": scalar(loss), "scalars": [], "seeds": None, "values": None}
    if flags == 2:
        return {**meaning, "values": {**decode_blob(body), "steps": count}}
    seeds = [f"0x{seed:016x}" for seed in body.read(f"<{count}Q")] if flags else None
    return {**meaning, "scalars": [scalar(body.take(4)) for _ in range(count)], "seeds": seeds}


def encode_update(m: Meaning) -> bytes:
    """The inverse."""
    seeds, values = m["seeds"], m["values"]
    count = values["steps"] if values else len(m["scalars"])
    flags = 2 if values else seeds is not None
    out = struct.pack("<I8sHHf", m["boot"], bytes.fromhex(m["base"]), count, flags, float(m["loss"]))
    if values:
        return out + blob_bytes(values)
    out += b"".join(struct.pack("<Q", int(seed, 16)) for seed in seeds or ())
    return out + struct.pack(f"<{count}f", *map(float, m["scalars"]))


def decode_blob(body: Bytes) -> Meaning:
    """Hash and size of a displacement."""
    blob, size = body.read("<16sI")
    need(size > 0)
    return {"blob": blob.hex(), "size": size}


def scalar(packed: bytes) -> float | str:
    """A projected gradient or loss; NaN has one encoding."""
    (value,) = struct.unpack("<f", packed)
    need(not math.isnan(value) or packed == b"\0\0\xc0\x7f")
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def decode_round(body: Bytes) -> Meaning:
    """Numbers and three lengths; bitmaps asked and heard, short list, those heard before if flag 2, entries."""
    steps, lanes, eps, deadline, attempt, flags, length, shorts, entries = body.read("<HHfIHHHHH")
    need(flags < 4, "UnknownFlags")
    need(1 <= steps <= 1000 and 1 <= lanes <= 4096 and math.isfinite(eps) and eps > 0 and length <= 8192)
    asked, heard = body.take(length), body.take(length)
    need(length == 0 or asked[-1] + heard[-1] > 0)
    short = pairs(body, shorts)
    need(all(1 <= s < steps for _, s in short))
    before = pairs(body, *body.read("<H")) if flags & 2 else []
    need(bool(before) == bool(flags & 2) and all(1 <= age <= 1000 for _, age in before))
    need(not {slot for slot, _ in before} & set(slots(heard)))
    return {
        "is_open": bool(flags & 1), "steps": steps, "lanes": lanes, "eps": eps, "deadline_ms": deadline,
        "attempt": attempt, "asked": slots(asked), "heard": slots(heard), "short": short,
        "entries": [decode_entry(body) for _ in range(entries)], "heard_before": before,
    }  # fmt: skip


def pairs(body: Bytes, count: int) -> list[list[int]]:
    """(slot, number) each; slots ascend strictly."""
    found = [list(body.read("<HH")) for _ in range(count)]
    need(all(a[0] < b[0] for a, b in pairwise(found)))
    return found


def encode_round(m: Meaning) -> bytes:
    """The inverse; both bitmaps end with the byte of the highest slot in either."""
    length = max(m["asked"] + m["heard"], default=-1) // 8 + 1
    before = m["heard_before"]
    numbers = (m["steps"], m["lanes"], m["eps"], m["deadline_ms"], m["attempt"], m["is_open"] + 2 * bool(before))
    out: bytes = struct.pack("<HHfIHHHHH", *numbers, length, len(m["short"]), len(m["entries"]))
    for bitmap in (m["asked"], m["heard"]):
        out += int(sum(1 << slot for slot in bitmap)).to_bytes(length, "little")
    out += b"".join(struct.pack("<HH", *pair) for pair in m["short"])
    out += struct.pack("<H", len(before)) if before else b""
    return out + b"".join(struct.pack("<HH", *pair) for pair in before) + encode_all(m["entries"])


def slots(bitmap: bytes) -> list[int]:
    """Slot s is bit s mod 8 of byte s div 8."""
    return [s for s in range(8 * len(bitmap)) if bitmap[s // 8] >> s % 8 & 1]


def decode_entry(body: Bytes) -> Meaning:
    """version, number of terms and flags, terms, displacement if bit 14, hash before, digest after."""
    version, head = body.read("<IH")
    aged, displaced, count = head >> 15, head >> 14 & 1, head & 0x3FFF
    need(count <= (9600 if aged else 12_000))
    terms = [decode_term(body, aged) for _ in range(count)]
    need(any(term["age"] for term in terms) == aged)
    need(all(term["age"] <= min(1000, version) and math.isfinite(term["coefficient"]) for term in terms))
    added = decode_blob(body) if displaced else None
    hashes = {"previous": body.take(16).hex(), "digest": body.take(16).hex()}
    return {"version": version, "terms": terms, **hashes, "displacement": added}


def decode_term(body: Bytes, aged: int) -> Meaning:
    """age if bit 15, lane, step, coefficient."""
    age = body.read("<H")[0] if aged else 0
    lane, step, c = body.read("<HHf")
    return {"lane": lane, "step": step, "coefficient": c, "age": age}


def encode_all(entries: Iterable[Meaning]) -> bytes:
    """Entries, one after the other."""
    out = b""
    for e in entries:
        head = len(e["terms"]) | is_aged(e) << 15 | (e["displacement"] is not None) << 14
        out += struct.pack("<IH", e["version"], head) + terms_and_displacement(e)
        out += bytes.fromhex(e["previous"] + e["digest"])
    return out


def decode_want(body: Bytes) -> Meaning:
    """boot, flags; first entry if flag 2; hash, number and indices of chunks if flag 4."""
    boot, flags = body.read("<IB")
    need(flags < 8, "UnknownFlags")
    first = body.read("<I")[0] if flags & 2 else None
    blob, count = body.read("<16sH") if flags & 4 else (None, None)
    need(count != 0)
    chunks = list(body.read(f"<{count or 0}H"))
    return {
        "boot": boot,
        "welcome": bool(flags & 1),
        "entries_from": first,
        "blob": blob and blob.hex(),
        "chunks": chunks,
    }


def encode_want(m: Meaning) -> bytes:
    """The inverse."""
    first, blob, chunks = m["entries_from"], m["blob"], m["chunks"]
    flags = m["welcome"] + 2 * (first is not None) + 4 * (blob is not None)
    out = struct.pack("<IB", m["boot"], flags) + (struct.pack("<I", first) if first is not None else b"")
    return out + (struct.pack(f"<16sH{len(chunks)}H", bytes.fromhex(blob), len(chunks), *chunks) if blob else b"")


def decode_welcome(body: Bytes) -> Meaning:
    """boot, slot."""
    return dict(zip(("boot", "slot"), body.read("<IH"), strict=True))


def encode_welcome(m: Meaning) -> bytes:
    """The inverse."""
    return struct.pack("<IH", m["boot"], m["slot"])


def decode_entries(body: Bytes) -> Meaning:
    """Number of entries, then each."""
    return {"entries": [decode_entry(body) for _ in range(*body.read("<H"))]}


def encode_entries(m: Meaning) -> bytes:
    """The inverse."""
    return struct.pack("<H", len(m["entries"])) + encode_all(m["entries"])


def decode_chunk(body: Bytes) -> Meaning:
    """hash, index, count, size of the blob, bytes of the chunk, data."""
    blob, index, count, size, length = body.read("<16sHHII")
    need(index < count and 0 < length <= min(65536, size))
    return {"blob": blob.hex(), "index": index, "count": count, "size": size, "data": body.take(length).hex()}


def encode_chunk(m: Meaning) -> bytes:
    """The inverse."""
    data = bytes.fromhex(m["data"])
    return struct.pack("<16sHHII", bytes.fromhex(m["blob"]), m["index"], m["count"], m["size"], len(data)) + data


def decode_refusal(body: Bytes) -> Meaning:
    """boot, reason."""
    boot, reason = body.read("<IB")
    need(1 <= reason <= 5, "UnknownType")
    return {"boot": boot, "reason": reason}


def encode_refusal(m: Meaning) -> bytes:
    """The inverse."""
    return struct.pack("<IB", m["boot"], m["reason"])


def decode_offer(body: Bytes) -> Meaning:
    """version, hash, size of a snapshot."""
    version, blob, size = body.read("<I16sI")
    need(size > 0)
    return {"version": version, "blob": blob.hex(), "size": size}


def encode_offer(m: Meaning) -> bytes:
    """The inverse."""
    return struct.pack("<I16sI", m["version"], bytes.fromhex(m["blob"]), m["size"])


CODECS: dict[str, tuple[Callable[[Bytes], Meaning], Callable[[Meaning], bytes]]] = {
    "update": (decode_update, encode_update),
    "round": (decode_round, encode_round),
    "want": (decode_want, encode_want),
    "welcome": (decode_welcome, encode_welcome),
    "entries": (decode_entries, encode_entries),
    "chunk": (decode_chunk, encode_chunk),
    "refusal": (decode_refusal, encode_refusal),
    "offer": (decode_offer, encode_offer),
}
