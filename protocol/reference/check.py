"""Decode every golden vector and encode it again; the way to start an implementation in another language."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from protocol.reference import core, frames
from protocol.reference.core import Refused

try:
    import zstandard
except ImportError:
    zstandard = None  # type: ignore[assignment]

Found = Iterator[tuple[str, bool]]


def check(golden: Path) -> Found:
    """A (name, holds) of each vector."""
    for part in (_directions, _path, _mask, _frames, _arrays):
        yield from part(golden)


def skipped() -> str:
    """Why something was not checked, or nothing."""
    return "" if zstandard else "arrays were not checked: this Python has no zstandard"


def _read(golden: Path, name: str) -> Any:
    return json.loads((golden / name).read_text("utf-8"))


def _directions(golden: Path) -> Found:
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    yield "Philox4x64-10, Random123's known answer", core.philox(0, (0, 0)) == known
    file = _read(golden, "directions.json")
    table = core.packed([core.quantile(i) for i in range(65536)])
    yield "quantile table", hashlib.sha256(table).hexdigest() == file["quantiles_sha256"]
    for v in file["slices"] + file["hashed"]:
        values = core.packed(list(core.direction(v["stream"], int(v["seed"], 16), v["start"], v["stop"])))
        expected = (values.hex(), hashlib.sha256(values).hexdigest())
        name = f"{v['stream']} {v['seed']} {v['start']}…{v['stop']}"
        yield name, v.get("float32", v.get("sha256")) == expected["sha256" in v]


def _path(golden: Path) -> Found:
    file = _read(golden, "path.json")
    for v in file["seeds"]:
        place = (v["version"], v["lane"], v["step"])
        yield f"seed {place}", core.seed_for(bytes.fromhex(v["run_id"]), *place) == int(v["seed"], 16)
    for i, v in enumerate(file["coefficients"]):
        made = core.coefficient(v["lr"] / v["perturbations"], v["scalars"], v["total_weight"])
        yield f"coefficient {i}", struct.pack("<f", made) == struct.pack("<f", v["coefficient"])
    for i, v in enumerate(file["apply"]):
        theta, z = (core.floats(bytes.fromhex(v[key])) for key in ("theta", "z"))
        yield f"apply {i}", core.packed(core.apply(theta, z, v["c"])).hex() == v["result"]
    for i, v in enumerate(file["inner_products"]):
        made = core.inner_product(*(core.floats(bytes.fromhex(v[key])) for key in ("g_p", "z")))
        yield f"inner product {i}", struct.pack("<f", made) == struct.pack("<f", v["product"])
    for i, v in enumerate(file["digests"]):
        yield f"digest {i}", core.digest(core.floats(bytes.fromhex(v["theta"]))).hex() == v["digest"]
    mask = (golden / "mask.bin").read_bytes()
    for v in file["runs"]:
        yield f"run on {v['stream']}", _replay(mask, v)
        yield f"inner products of a round on {v['stream']}", _products(mask, v) == v["products"]


def _replay(mask: bytes, run: dict[str, Any]) -> bool:
    """theta from the mask and the entries alone, every hash and digest held against the chain."""
    matrices = core.decode_mask(mask)["matrices"]
    theta = core.floats(b"".join(bytes.fromhex(m["theta_0"]) for m in matrices))
    run_id, previous, holds = bytes.fromhex(run["run_id"]), core.short_hash(mask).hex(), True
    for entry in run["entries"]:
        for term in entry["terms"]:
            seed = core.seed_for(run_id, entry["version"], term["lane"], term["step"])
            theta = core.apply(theta, core.direction(run["stream"], seed, 0, len(theta)), term["coefficient"])
        due = (entry["version"] + 1) % run["digest_every"] == 0
        holds &= entry["digest"] == (core.digest(theta) if due else bytes(16)).hex() and entry["previous"] == previous
        previous = core.entry_hash(run_id, entry).hex()
        holds &= previous == entry["hash"]
    return holds and core.packed(theta).hex() == run["theta"]


def _products(mask: bytes, run: dict[str, Any]) -> list[list[float]]:
    """Of round 1: two lanes, three directions each."""
    g_p = core.floats(b"".join(bytes.fromhex(m["g_p"]) for m in core.decode_mask(mask)["matrices"]))
    seeds = [[core.seed_for(bytes.fromhex(run["run_id"]), 1, lane, step) for step in range(3)] for lane in range(2)]
    return [
        [core.inner_product(g_p, core.direction(run["stream"], seed, 0, len(g_p))) for seed in lane] for lane in seeds
    ]


def _mask(golden: Path) -> Found:
    data, file = (golden / "mask.bin").read_bytes(), _read(golden, "mask.json")
    mask = core.decode_mask(data)
    yield "mask file", all(mask[key] == file[key] for key in mask) and core.encode_mask(mask) == data
    yield "mask hash", core.short_hash(data).hex() == file["hash"]
    for v in file["refused"]:
        yield f"mask refused: {v['name']}", _refusal(core.decode_mask, v["hex"]) == "MaskError"


def _refusal(decode: Callable[[bytes], object], text: str) -> str:
    data = bytes(int(text[3:])) if text.startswith("00*") else bytes.fromhex(text)
    try:
        decode(data)
    except Refused as refused:
        return str(refused)
    return ""


def _frames(golden: Path) -> Found:
    file = _read(golden, "frames.json")
    for v in file["frames"]:
        data, kind = bytes.fromhex(v["hex"]), v["type"]
        same = frames.decode(data) == (kind, v["meaning"]) and frames.encode(kind, v["meaning"]) == data
        yield f"frame: {v['name']}", same
    for v in file["refused"]:
        yield f"frame refused: {v['name']}", _refusal(frames.decode, v["hex"]) == v["error"]


def _arrays(golden: Path) -> Found:
    if zstandard is None:
        return
    codes = {"float32": 4, "uint32": 4, "uint16": 2}
    for v in _read(golden, "arrays.json")["arrays"]:
        yield (
            f"array: {v['name']}",
            _array(frames.Bytes(bytes.fromhex(v["encoded"])), codes[v["dtype"]]).hex() == v["values"],
        )
    mask = (golden / "mask.bin").read_bytes()
    yield "mask blob", _unblob((golden / "mask.blob").read_bytes()) == mask
    yield from _snapshot((golden / "snapshot.blob").read_bytes(), _read(golden, "snapshot.json"))


def _snapshot(blob: bytes, said: dict[str, Any]) -> Found:
    """Hash, header, theta and its digest."""
    body = frames.Bytes(blob)
    magic, run_id, version, head, digest, size = body.read("<8s16sI16s16sI")
    theta = core.floats(_array(body, 4))
    yield "snapshot hash", core.short_hash(blob).hex() == said["hash"]
    yield "snapshot magic and size", magic == b"MKSNAP\x01\n" and size == len(theta) and not body.data
    place = {"run_id": run_id.hex(), "version": version, "head": head.hex(), "digest": digest.hex()}
    yield "snapshot place", all(said[key] == value for key, value in place.items())
    yield "snapshot theta", core.packed(theta).hex() == said["theta"] and core.digest(theta) == digest


def _array(body: frames.Bytes, width: int) -> bytes:
    _, count, length = body.read("<BII")
    planes = zstandard.ZstdDecompressor().decompress(body.take(length), max_output_size=width * count)
    return b"".join(planes[i::count] for i in range(count))


def _unblob(blob: bytes) -> bytes:
    """The mask file of a mask blob: gaps summed up within each matrix."""
    body = frames.Bytes(blob)
    head_bytes, size = body.read("<II")
    head = body.take(head_bytes)
    gaps = iter(struct.unpack(f"<{size}I", _array(body, 4)))
    indices, at = b"", 76
    for _ in range(*struct.unpack_from("<I", head, 72)):
        name_bytes, dimensions, count = struct.unpack_from("<HBI", head, at)
        at += 7 + 4 * dimensions + name_bytes
        index = 0
        for gap in islice(gaps, count):
            index += gap
            indices += struct.pack("<I", index)
    return head + indices + _array(body, 4) + _array(body, 4)
