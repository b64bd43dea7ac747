"""Golden vectors of what nodes make: values blobs, made with `meerkat_mq.wire`, and the toy engine's steps."""

from collections.abc import Callable
from functools import partial

import numpy as np
import zstandard

from meerkat_mq.config import Codec
from meerkat_mq.core.batches import batch_rows
from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Coefficient, Displacement, Entry, apply_terms, digest, short_hash
from meerkat_mq.core.step import projected_gradient
from meerkat_mq.core.values import mean_displacement
from meerkat_mq.engines.toy import QuadraticEngine
from meerkat_mq.wire.values import MAGIC, decode_values, encode_values
from protocol.vectors_core import RUN_ID, golden_mask, hex_float32, hex_u64, refusal, run_meaning, seed_of, to_json

_CODECS: tuple[Codec, ...] = ("float32", "bfloat16", "int8")
_COUNT = 6  # of the blobs to refuse
TOLERANCE = 1e-3  # of a projected gradient: a unit in the last place of a loss near 1, over 2·eps, a few times


def _golden_values() -> dict[str, Float32Array]:
    """Around the size of a block of scales, and edges of each codec."""
    edges = [0.0, -0.0, 1e-45, 1e-38, -3.3895e38, 3.4028234663852886e38, 1.00390625, 1.01171875, 0.5, -127.5]
    blocks = direction("mk1", 41, 0, 300) * np.float32(1e-3)
    blocks[128:256] = 0.0
    return {
        "one": np.array([-0.25], np.float32),
        "a block": direction("mk1", 42, 0, 128) * np.float32(1e-3),
        "three blocks, one of zeros": blocks,
        "edges": np.array(edges, np.float32),
        "too small for a scale": np.array([1e-45, -1e-37, 3e-38], np.float32),
    }


def golden_blobs() -> dict[str, tuple[Codec, Float32Array, bytes]]:
    """Each of the golden values in each codec."""
    return {
        f"{name}, {codec}": (codec, values, encode_values(values, codec))
        for name, values in _golden_values().items()
        for codec in _CODECS
    }


def _hostile_values() -> dict[str, bytes]:
    plain = encode_values(direction("mk1", 43, 0, _COUNT), "float32")
    raw = np.array([1, 2, 3, np.inf, 5, 6], "<f4").view(np.uint8).reshape(_COUNT, 4).T.tobytes()
    return {
        "empty": b"",
        "another magic": b"MKSNAP" + plain[6:],
        "another format version": MAGIC[:6] + b"\2" + plain[7:],
        "an unknown codec": plain[:8] + b"\4" + plain[9:],
        "codec 0": plain[:8] + b"\0" + plain[9:],
        "another number of values": plain[:9] + b"\7" + plain[10:],
        "another codec": plain[:8] + b"\2" + plain[9:],
        "one byte too many": plain + b"\0",
        "cut short": plain[:-1],
        "nothing behind the head": plain[:13],
        "not zstd": plain[:13] + bytes(40),
        "zstd without its size": plain[:13] + zstandard.ZstdCompressor(write_content_size=False).compress(raw),
        "a value not finite": plain[:13] + zstandard.ZstdCompressor().compress(raw),
        "without scales": _blocks([1, 2, 3, 4, 5, 6]),
        "a code of -128": _blocks([1, 2, 3, -128, 5, 6], 1.0),
        "a negative scale": _blocks([1, 2, 3, 4, 5, 6], -1.0),
        "a scale that is not 0 and below 2^-126": _blocks([1, 2, 3, 4, 5, 6], 1e-39),
        "a scale above the largest": _blocks([1, 2, 3, 4, 5, 6], 2.68e36),
    }


def _blocks(codes: list[int], *scales: float) -> bytes:
    head = encode_values(np.ones(_COUNT, np.float32), "int8")[:13]
    raw = np.array(codes, np.int8).tobytes() + np.array(scales, "<f4").tobytes()
    return head + zstandard.ZstdCompressor().compress(raw)


def _means() -> list[dict[str, object]]:
    """Mean displacements, whose order of addition can be seen in the bits."""
    values = [direction("mk1", seed, 0, 12) for seed in (51, 52, 53)]
    weights = ((1.0,), (0.25, 0.5), (1 / 3, 1 / 3, 1 / 3), (181 / 768, 256 / 768, 148 / 768))
    return [
        {
            "weights": [weight.hex() for weight in each],
            "values": [hex_float32(part) for part in values[: len(each)]],
            "mean": hex_float32(mean_displacement(zip(each, values, strict=False), 12)),
        }
        for each in weights
    ]


def displaced_run(mask: Mask) -> tuple[tuple[Entry, ...], Float32Array, dict[str, bytes]]:
    """A run of three versions with displacements: entries, where theta ends, and blobs by hash."""
    blobs = [encode_values(direction("mk1", 61 + i, 0, mask.size) * np.float32(0.01), _CODECS[i]) for i in range(3)]
    theta, previous, entries = mask.theta_0, mask.hash, []
    for version, blob in enumerate(blobs):
        terms = (Coefficient(0, 0, 2.0**-10, min(version, 1)),) if version else ()
        apply_terms(theta, terms, partial(seed_of, version), "mk1")
        theta += decode_values(blob, short_hash(blob), mask.size)
        entry = Entry(version, terms, previous, digest(theta), Displacement(short_hash(blob), len(blob)))
        previous = entry.hash(RUN_ID)
        entries.append(entry)
    return tuple(entries), theta, {short_hash(blob).hex(): blob for blob in blobs}


def values() -> bytes:
    """Values blobs, their mean, a run with displacements, and blobs to refuse though their hashes are right."""
    blobs = [
        {
            "name": name,
            "codec": codec,
            "count": given.size,
            "values": hex_float32(given),
            "hash": short_hash(blob).hex(),
            "encoded": blob.hex(),
            "decoded": hex_float32(decode_values(blob, None, given.size)),
        }
        for name, (codec, given, blob) in golden_blobs().items()
    ]
    refused = [
        {
            "name": name,
            "error": refusal(lambda data: decode_values(data, short_hash(data), _COUNT), data),
            "hex": data.hex(),
        }
        for name, data in _hostile_values().items()
    ]
    entries, theta, kept = displaced_run(golden_mask())
    run = {
        **run_meaning("with displacements", entries, theta),
        "blobs": {name: blob.hex() for name, blob in kept.items()},
    }
    return to_json({"blobs": blobs, "means": _means(), "runs": [run], "refused_of": _COUNT, "refused": refused})


def _batches() -> list[dict[str, object]]:
    cases = [("pump-3", 7, 4, step) for step in (0, 1, 2, 100)] + [("a", 1, 3, 0), ("b", 8, 8, 5), ("b", 3, 16, 2)]
    return [
        {
            "run_id": RUN_ID.hex(),
            "node": node,
            "rows": rows,
            "batch_size": size,
            "step": step,
            "numbers": batch_rows(RUN_ID, node, rows, size, step),
        }
        for node, rows, size, step in cases
    ]


def _gradients() -> list[dict[str, object]]:
    theta, eps = direction("mk1", 71, 0, 100) * np.float32(0.1), float(np.float32(1e-3))
    made = []
    for stream, rows in (("mk1", [7]), ("mk1", [7, 8, 7, 2**53 - 1]), ("rademacher", [1, 2, 3])):
        engine, z = QuadraticEngine(theta.size), direction(stream, 72, 0, theta.size)
        g, loss = projected_gradient(engine, theta, z, eps, engine.prepare([{"seed": row} for row in rows]))
        made.append(
            {
                "theta": hex_float32(theta),
                "z": hex_float32(z),
                "eps": eps,
                "rows": [hex_u64(row) for row in rows],
                "g": g,
                "loss": loss,
                "tolerance": TOLERANCE,
            }
        )
    return made


def toy() -> bytes:
    """The toy engine: which rows a step sees, and what it measures."""
    return to_json({"batches": _batches(), "gradients": _gradients()})


FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "values.json": ("values blobs, means, a run with displacements, and blobs to refuse (section 5)", values),
    "toy.json": ("the toy engine: batches, and projected gradients within a tolerance (section 7)", toy),
}
