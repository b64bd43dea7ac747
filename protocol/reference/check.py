"""Decode every golden vector and encode it again; the way to start an implementation in another language."""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from protocol.reference import core, frames, toy, values
from protocol.reference.core import Refused

Found = Iterator[tuple[str, bool]]


def check(golden: Path) -> Found:
    """A (name, holds) of each vector."""
    for part in (_directions, _path, _mask, _frames, _arrays, _toy):
        yield from part(golden)


def skipped() -> str:
    """Why something was not checked, or nothing."""
    return "" if values.AVAILABLE else "arrays were not checked: this Python has no zstandard"


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
        yield f"run: {v['name']}", _replay(mask, v)
        if "products" in v:
            yield f"inner products of a round on {v['stream']}", _products(mask, v) == v["products"]


def _replay(mask: bytes, run: dict[str, Any]) -> bool:
    """theta from the mask and the entries alone, every hash and digest held against the chain."""
    matrices = core.decode_mask(mask)["matrices"]
    theta = core.floats(b"".join(bytes.fromhex(m["theta_0"]) for m in matrices))
    run_id, previous, holds = bytes.fromhex(run["run_id"]), core.short_hash(mask).hex(), True
    for entry in run["entries"]:
        for term in entry["terms"]:
            seed = core.seed_for(run_id, entry["version"] - term["age"], term["lane"], term["step"])
            theta = core.apply(theta, core.direction(run["stream"], seed, 0, len(theta)), term["coefficient"])
        if entry["displacement"]:
            blob = bytes.fromhex(run["blobs"][entry["displacement"]["blob"]])
            holds &= len(blob) == entry["displacement"]["size"]
            theta = core.add(theta, values.decode(blob, core.short_hash(blob), len(theta)))
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
    if not values.AVAILABLE:
        return
    for v in _read(golden, "arrays.json")["arrays"]:
        found = values.array(frames.Bytes(bytes.fromhex(v["encoded"])), v["dtype"], v["count"])
        yield f"array: {v['name']}", found.hex() == v["values"]
    mask = (golden / "mask.bin").read_bytes()
    yield "mask blob", _unblob((golden / "mask.blob").read_bytes()) == mask
    yield from _snapshot((golden / "snapshot.blob").read_bytes(), _read(golden, "snapshot.json"))
    yield from _values(_read(golden, "values.json"), mask)


def _values(file: dict[str, Any], mask: bytes) -> Found:
    for v in file["blobs"]:
        found = values.decode(bytes.fromhex(v["encoded"]), bytes.fromhex(v["hash"]), v["count"])
        made = values.quantise(core.floats(bytes.fromhex(v["values"])), v["codec"])
        same = made == values.parts(bytes.fromhex(v["encoded"]), v["codec"], v["count"])
        yield f"values: {v['name']}", same and core.packed(found).hex() == v["decoded"]
    for i, v in enumerate(file["means"]):
        parts = [core.floats(bytes.fromhex(part)) for part in v["values"]]
        mean = core.mean_displacement([float.fromhex(weight) for weight in v["weights"]], parts)
        yield f"mean displacement {i}", core.packed(mean).hex() == v["mean"]
    for v in file["refused"]:
        refused = _refusal(lambda data: values.decode(data, core.short_hash(data), file["refused_of"]), v["hex"])
        yield f"values refused: {v['name']}", refused == v["error"]
    for v in file["runs"]:
        yield f"run: {v['name']}", _replay(mask, v)


def _snapshot(blob: bytes, said: dict[str, Any]) -> Found:
    """Hash, header, theta and its digest."""
    body = frames.Bytes(blob)
    magic, run_id, version, head, digest, size = body.read("<8s16sI16s16sI")
    theta = core.floats(values.array(body, "float32", size))
    yield "snapshot hash", core.short_hash(blob).hex() == said["hash"]
    yield "snapshot magic and size", magic == b"MKSNAP\x01\n" and size == len(theta) and not body.data
    place = {"run_id": run_id.hex(), "version": version, "head": head.hex(), "digest": digest.hex()}
    yield "snapshot place", all(said[key] == value for key, value in place.items())
    yield "snapshot theta", core.packed(theta).hex() == said["theta"] and core.digest(theta) == digest


def _unblob(blob: bytes) -> bytes:
    """The mask file of a mask blob: gaps summed up within each matrix."""
    body = frames.Bytes(blob)
    head_bytes, size = body.read("<II")
    head = body.take(head_bytes)
    gaps = iter(struct.unpack(f"<{size}I", values.array(body, "uint32", size)))
    indices, at = b"", 76
    for _ in range(*struct.unpack_from("<I", head, 72)):
        name_bytes, dimensions, count = struct.unpack_from("<HBI", head, at)
        at += 7 + 4 * dimensions + name_bytes
        index = 0
        for gap in islice(gaps, count):
            index += gap
            indices += struct.pack("<I", index)
    return head + indices + values.array(body, "float32", size) + values.array(body, "float32", size)


def _toy(golden: Path) -> Found:
    file = _read(golden, "toy.json")
    for v in file["batches"]:
        made = toy.batch_rows(bytes.fromhex(v["run_id"]), v["node"], v["rows"], v["batch_size"], v["step"])
        yield f"batch {v['step']} of {v['rows']} rows", made == v["numbers"]
    for v in file["gradients"]:
        theta, z = (core.floats(bytes.fromhex(v[key])) for key in ("theta", "z"))
        targets = [list(core.direction("mk1", int(seed, 16), 0, len(theta))) for seed in v["rows"]]
        g, loss = toy.projected_gradient(theta, z, v["eps"], targets)
        near = abs(g - v["g"]) <= v["tolerance"] and math.isclose(loss, v["loss"], rel_tol=1e-6)
        yield f"projected gradient of {len(targets)} rows", near
