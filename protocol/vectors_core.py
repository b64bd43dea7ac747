"""Golden vectors of the method's arithmetic, made with `meerkat_mq.core`: NumPy only, so any machine can make them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from meerkat_mq.core.directions import QUANTILES_SHA256, Float32Array, direction
from meerkat_mq.core.gradip import inner_product, inner_products
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.core.path import (
    NO_DIGEST,
    Coefficient,
    Entry,
    apply,
    apply_terms,
    coefficient,
    digest,
    digest_due,
    seed_for,
)
from meerkat_mq.errors import MeerkatError

RUN_ID = bytes(range(0x10, 0x20))
TOP_SEED = 2**64 - 1
SEEDS = (0, 1, 0x0123456789ABCDEF, TOP_SEED)
FAR = 2**33 + 3


def to_json(value: object) -> bytes:
    """Readable JSON with a stable layout: one line an item of each list."""

    def line(item: object) -> str:
        return json.dumps(item, ensure_ascii=False)

    def block(key: str, item: object) -> str:
        if isinstance(item, list) and item:
            return f"{line(key)}: [\n  " + ",\n  ".join(map(line, item)) + "\n ]"
        return f"{line(key)}: {line(item)}"

    assert isinstance(value, Mapping)
    return ("{\n " + ",\n ".join(block(key, item) for key, item in value.items()) + "\n}\n").encode()


def hex_float32(values: Float32Array) -> str:
    """Little-endian bytes as hex."""
    return values.astype("<f4").tobytes().hex()


def hex_u64(value: int) -> str:
    """A u64 as JSON text, since many JSON readers round integers above 2**53."""
    return f"0x{value:016x}"


def refusal(decode: Callable[[bytes], object], data: bytes) -> str:
    """The name of the error that refuses `data`."""
    try:
        decode(data)
    except MeerkatError as error:
        return type(error).__name__
    raise AssertionError(data.hex())


def directions() -> bytes:
    """Slices of both streams, written out or as the hash of many values."""
    places = {
        "mk1": ((0, 40), (7, 23), (15, 17), (16, 16), (FAR, FAR + 19)),
        "rademacher": ((0, 70), (63, 65), (255, 258), (256, 256), (FAR, FAR + 9)),
    }
    slices: list[dict[str, object]] = []
    long: list[dict[str, object]] = []
    for stream, ranges in places.items():
        for seed in SEEDS:
            for start, stop in ranges:
                place = {"stream": stream, "seed": hex_u64(seed), "start": start, "stop": stop}
                slices.append({**place, "float32": hex_float32(direction(stream, seed, start, stop))})
        values = direction(stream, SEEDS[2], 5, 20_006).astype("<f4")
        place = {"stream": stream, "seed": hex_u64(SEEDS[2]), "start": 5, "stop": 20_006}
        long.append({**place, "sha256": hashlib.sha256(values.tobytes()).hexdigest()})
    return to_json({"quantiles_sha256": QUANTILES_SHA256, "slices": slices, "hashed": long})


def _float32(value: float) -> float:
    return float(np.float32(value))


_EQUAL = [(1, _float32(0.1)), (1, _float32(-0.25)), (1, _float32(3.3e-5)), (1, _float32(7.75))]
_CANCELLING = [(2**24, _float32(1e30)), (1, _float32(1e-20)), (2**24, _float32(-1e30)), (3, _float32(1.5))]
_COEFFICIENTS: list[tuple[float, list[tuple[int, float]], int, int]] = [
    (3e-4, [(1, _float32(0.731))], 1, 1),
    (3e-4, _EQUAL, 4, 1),
    (3e-4, _EQUAL[::-1], 4, 1),
    (3e-4, [_EQUAL[i] for i in (2, 0, 3, 1)], 4, 1),
    (0.01, _CANCELLING, 2**25 + 4, 1),
    (0.01, _CANCELLING[::-1], 2**25 + 4, 1),
    (0.01, [_CANCELLING[i] for i in (1, 3, 0, 2)], 2**25 + 4, 1),
    (1e-3, [(5, _float32(2.5)), (7, _float32(-1.25))], 20, 1),  # weight 8 took fewer steps: counts, adds 0
    (1e-3, [], 3, 1),
    (1e-3, [(1, -0.0)], 1, 1),
    (1.0, [(1, _float32(1e-45))], 1, 1),
    (1.0, [(1, _float32(-1e-45))], 4, 1),
    (1.0, [(1, _float32(3.4028234663852886e38)), (2**24, _float32(3.4028234663852886e38))], 2**24 + 1, 1),
    (3e-4, _EQUAL, 4, 2),
    (3e-4, _EQUAL, 4, 3),
    (0.1, [(5, _float32(2.5)), (7, _float32(-1.25))], 20, 10),
    (3e-4, [(256, _float32(0.1)), (181, _float32(-0.25)), (148, _float32(3.3e-5))], 768, 1),  # staleness weights
    (1e-3, [(2**32 - 1, _float32(0.1)), (2**32 - 257, _float32(-0.3))], 2**33, 1),  # these products are rounded
]


def _coefficients() -> list[dict[str, object]]:
    return [
        {
            "lr": lr,
            "perturbations": perturbations,
            "scalars": scalars,
            "total_weight": total,
            "coefficient": coefficient(lr / perturbations, scalars, total),
        }
        for lr, scalars, total, perturbations in _COEFFICIENTS
    ]


def _seeds() -> list[dict[str, object]]:
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (77, 3, 9), (2**32 - 1, 2**32 - 1, 2**32 - 1)]
    return [
        {"run_id": run_id.hex(), "version": v, "lane": lane, "step": t, "seed": hex_u64(seed_for(run_id, v, lane, t))}
        for run_id in (RUN_ID, bytes(16))
        for v, lane, t in places
    ]


def _applied() -> list[dict[str, object]]:
    edges = np.array([0.0, -0.0, 1.0, -1.0, 1e-45, 1.17549435e-38, 3.4e38, 1 + 2**-23, 1e-3, 0.1], dtype=np.float32)
    cases = [(edges, direction("mk1", 3, 0, edges.size), c) for c in (0.0, 0.1, -0.1, 1e-45, -1e-38, 1e30)]
    cases += [(direction("mk1", 4, 0, 24), direction(stream, 5, 100, 124), 3.7e-4) for stream in ("mk1", "rademacher")]
    out = []
    for theta, z, wide in cases:
        c, after = _float32(wide), theta.copy()
        apply(after, z, c, np.empty_like(z))
        out.append({"theta": hex_float32(theta), "z": hex_float32(z), "c": c, "result": hex_float32(after)})
    return out


# Cubes of 100 values of mk1, made on one machine and written out: the last bits of a power depend on the processor.
_CUBES = bytes.fromhex(
    "4ea21d40d3a6a63ca2cf31bea29423b74b80673e3f1790404ef8383e1a6646bd5ba1e8bf517f66c0dca072bb4ba849bfb78a813f0d362741"
    "3080e8b8bd7f2741c9db24be6207ab40e0e947bb1e1593bdcc9b3f3d4cda333b93fd3640af4680baedc10f3e53f2fc4014a147bce51aea3c"
    "27bff4beb9b25dc07cf8debcd1eb4a3ed0b67b40d92c083ff0b627b99debe53a441a87bdcbc91dc14b77453dd056aa3b843191c007a02d3f"
    "dfee23bce7d4b0bf14c01f41e58b43414024e73ec591dd3f5250d33f1fffc4bff30125bc1c4993bf9bf6c83e622e88ba5cef82c0b7e9a4bc"
    "6756bfba91bd1a4146d4973d241c0f3973b45d3f877c1a3f68c798bf74f0313ebe54acc018d6f13eb767c1c02920a7bd4087a5bd4a7e843a"
    "72ed83b9dbed283d20b87dbe1d73e540bb39ffbe86d0a4412321a2bd5d51e3be285118c093bb82c0b0f2433ab3a1e6be271b1ebd1a778a3b"
    "9f46413ba959a03b8bd9ac3fe15a0041da8b9c3cb39c603aae83cb39d05cb33eef4f49bfe4e29bbf8f331dc0c9496dbda7e299bf4b2a513b"
    "b91611bdfcbd4a3a"
)


def _inner_products() -> list[dict[str, object]]:
    """Sizes around powers of two, where another order of summation gives other bits; edges of float32."""
    cases = [(direction("mk1", 31, 0, n), direction("mk1", 32, 0, n)) for n in (1, 2, 3, 4, 5, 7, 8, 9, 33)]
    cases += [(np.frombuffer(_CUBES, "<f4"), direction("rademacher", 34, 0, 100))]
    huge, tiny = np.array([3e38, 3e38, 1.0], np.float32), np.array([1e-30, 0.0], np.float32)
    cases += [
        (huge, huge),
        (huge, -huge),
        (tiny, -tiny),
        (np.array([1e30, 1.0, -1e30], np.float32), np.ones(3, np.float32)),
    ]
    cases += [(np.array([1e30, -1e30, 1.0], np.float32), np.ones(3, np.float32))]
    return [{"g_p": hex_float32(g_p), "z": hex_float32(z), "product": inner_product(g_p, z)} for g_p, z in cases]


def golden_mask() -> Mask:
    """Three matrices, whose order by bytes is not the order by letters; ten weights."""

    def matrix(name: str, shape: tuple[int, ...], indices: list[int], seed: int) -> MaskedMatrix:
        values = direction("mk1", seed, 0, 2 * len(indices)) * np.float32(0.05)
        return MaskedMatrix(
            name, shape, np.array(indices, dtype=np.uint32), values[: len(indices)], values[len(indices) :]
        )

    return Mask(
        (
            matrix("Z.weight", (4, 6), [0, 1, 22, 23], 11),
            matrix("a.weight", (70_000, 60_000), [65_535, 65_536, 4_199_999_999], 12),
            matrix("é.weight", (2, 3, 5), [4, 17, 29], 13),
        ),
        hashlib.sha256(b"base").digest(),
        hashlib.sha256(b"tokenizer").digest(),
    )


def golden_entries(mask: Mask, stream: str = "mk1", digest_every: int = 2) -> tuple[tuple[Entry, ...], Float32Array]:
    """A run of four versions over the golden mask: its entries and where theta ends."""
    steps = (
        ((0, 0, 2.5e-4), (0, 1, -1.25e-3), (1, 0, 3e-5), (1, 1, 0.0)),
        ((0, 0, -7.5e-4), (0, 1, 1e-4)),
        (),
        ((0, 0, 0.05), (7, 999, -0.025)),
    )
    theta, previous, entries = mask.theta_0, mask.hash, []
    for version, terms_of in enumerate(steps):
        terms = tuple(Coefficient(lane, step, _float32(c)) for lane, step, c in terms_of)
        apply_terms(theta, terms, partial(seed_of, version), stream)
        after = digest(theta) if digest_due(version + 1, digest_every) else NO_DIGEST
        entry = Entry(version, terms, previous, after)
        previous = entry.hash(RUN_ID)
        entries.append(entry)
    return tuple(entries), theta


def aged_entries(mask: Mask) -> tuple[tuple[Entry, ...], Float32Array]:
    """A buffered run of three versions, as `golden_entries`: terms of updates from an older theta, and of none."""
    steps = (
        ((0, 0, 0, 2.5e-4),),
        ((0, 0, 0, 1e-3), (0, 1, 0, -1.25e-3), (1, 0, 0, 3e-5)),
        ((1, 0, 1, 5e-4), (2, 3, 0, 1e-2)),
    )
    theta, previous, entries = mask.theta_0, mask.hash, []
    for version, terms_of in enumerate(steps):
        terms = tuple(Coefficient(lane, step, _float32(c), age) for age, lane, step, c in terms_of)
        apply_terms(theta, terms, partial(seed_of, version), "mk1")
        entry = Entry(version, terms, previous, digest(theta))
        previous = entry.hash(RUN_ID)
        entries.append(entry)
    return tuple(entries), theta


def seed_of(version: int, term: Coefficient) -> int:
    """The seed of a term of the golden run's entry `version`."""
    return seed_for(RUN_ID, version - term.age, term.lane, term.step)


def entry_meaning(entry: Entry) -> dict[str, object]:
    """An entry as JSON."""
    terms = [
        {"lane": term.lane, "step": term.step, "coefficient": term.coefficient, "age": term.age} for term in entry.terms
    ]
    added = entry.displacement
    return {
        "version": entry.version,
        "terms": terms,
        "previous": entry.previous.hex(),
        "digest": entry.digest.hex(),
        "displacement": None if added is None else {"blob": added.blob.hex(), "size": added.size},
    }


def run_meaning(
    name: str, entries: tuple[Entry, ...], theta: Float32Array, stream: str = "mk1", digest_every: int = 1
) -> dict[str, object]:
    """A run over the golden mask as JSON: its chain of entries, and where theta ends."""
    return {
        "name": name,
        "run_id": RUN_ID.hex(),
        "stream": stream,
        "digest_every": digest_every,
        "entries": [{**entry_meaning(entry), "hash": entry.hash(RUN_ID).hex()} for entry in entries],
        "theta": hex_float32(theta),
    }


def path() -> bytes:
    """Seeds, coefficients, apply, inner products, digests and a short run over the golden mask."""
    vectors = [np.zeros(1, np.float32), direction("mk1", 6, 0, 33), np.array([0.0, -0.0], np.float32)]
    mask, runs = golden_mask(), []
    for stream, every in (("mk1", 2), ("rademacher", 1)):
        run = run_meaning(f"on {stream}", *golden_entries(mask, stream, every), stream, every)
        runs.append({**run, "products": inner_products(mask.g_p, RUN_ID, 1, lanes=2, steps=3, stream=stream)})
    runs.append(run_meaning("buffered", *aged_entries(mask)))
    return to_json(
        {
            "seeds": _seeds(),
            "coefficients": _coefficients(),
            "apply": _applied(),
            "inner_products": _inner_products(),
            "digests": [{"theta": hex_float32(theta), "digest": digest(theta).hex()} for theta in vectors],
            "runs": runs,
        }
    )


def mask_file() -> bytes:
    """The canonical mask file."""
    return golden_mask().to_bytes()


def _hostile_masks() -> dict[str, bytes]:
    good = mask_file()
    first_index = len(good) - 12 * golden_mask().size

    def put(offset: int, data: bytes) -> bytes:
        return good[:offset] + data + good[offset + len(data) :]

    return {
        "empty": b"",
        "another format version": put(6, b"\x02"),
        "cut short": good[:-1],
        "one byte too many": good + b"\0",
        "no matrix": put(72, bytes(4)),
        "more matrices than the limit": put(72, b"\xff\xff\xff\xff"),
        "a name that is not UTF-8": good.replace(b"Z.weight", b"\xff.weight"),
        "names not ascending": good.replace(b"Z.weight", b"b.weight"),
        "the same name twice": good.replace(b"Z.weight", b"a.weight"),
        "indices not ascending": put(first_index + 4, bytes(4)),
        "an index outside its matrix": put(first_index + 12, (24).to_bytes(4, "little")),
        "theta_0 not a number": put(first_index + 4 * 10, b"\x00\x00\xc0\x7f"),
        "g_p infinite": put(first_index + 8 * 10, b"\x00\x00\x80\x7f"),
    }


def mask_meaning() -> bytes:
    """What the mask file says, and files that are to be refused."""
    mask = golden_mask()
    matrices = [
        {
            "name": matrix.name,
            "shape": list(matrix.shape),
            "indices": matrix.indices.tolist(),
            "theta_0": hex_float32(matrix.theta_0),
            "g_p": hex_float32(matrix.g_p),
        }
        for matrix in mask.matrices
    ]
    for data in _hostile_masks().values():
        refusal(Mask.from_bytes, data)
    refused = [{"name": name, "hex": data.hex()} for name, data in _hostile_masks().items()]
    return to_json(
        {
            "hash": mask.hash.hex(),
            "fingerprint": mask.fingerprint.hex(),
            "tokenizer_fingerprint": mask.tokenizer_fingerprint.hex(),
            "matrices": matrices,
            "refused": refused,
        }
    )


FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "directions.json": ("direction streams: slices, and hashes of longer slices (section 1)", directions),
    "path.json": ("seeds, coefficients, apply, inner products, digests, runs with their hash chain (section 2)", path),
    "mask.bin": ("a mask file (section 3)", mask_file),
    "mask.json": ("what mask.bin says, its hash, and mask files to refuse (section 3)", mask_meaning),
}
