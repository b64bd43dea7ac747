"""Portable direction streams: the same bits on every machine (protocol/SPECIFICATION.md, section 1).

Both streams read raw Philox4x64-10 words (Random123), key (seed, 0), counters 1, 2, 3, ….
"""

import hashlib
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from meerkat_mq.errors import BadValue, RunMismatch

Float32Array = npt.NDArray[np.float32]

STREAMS = ("mk1", "rademacher")
QUANTILES_SHA256 = "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"

_BLOCK_BITS = 256  # four 64-bit words
_BITS_PER_VALUE = {"mk1": 16, "rademacher": 1}
_FEW = 64  # values that take longer to begin than to make


def direction(stream: str, seed: int, start: int, stop: int) -> Float32Array:
    """Values start … stop-1 of the direction that `seed` names.

    "mk1" is standard normal, 16 bits a value; "rademacher" is ±1, one bit a value.

    Returns:
        float32 (stop - start,), perhaps not writeable; any slice equals the same slice of the whole.

    Raises:
        BadValue: unknown stream, or not 0 ≤ seed < 2**64 and 0 ≤ start ≤ stop.
    """
    if stream not in _BITS_PER_VALUE:
        raise BadValue("stream", f"{stream!r} is unknown", f"use one of {', '.join(STREAMS)}")
    if not (0 <= seed < 2**64 and 0 <= start <= stop):
        problem = f"seed {seed}, values {start}…{stop} are out of range"
        raise BadValue("direction", problem, "seed < 2**64, start ≤ stop")
    return (_few if stop - start <= _FEW else _values)(stream, seed, start, stop)


@lru_cache(maxsize=4096)  # all nodes of a simulated federation draw the same
def _few(stream: str, seed: int, start: int, stop: int) -> Float32Array:
    values = _values(stream, seed, start, stop)
    values.flags.writeable = False
    return values


def _values(stream: str, seed: int, start: int, stop: int) -> Float32Array:
    per_block = _BLOCK_BITS // _BITS_PER_VALUE[stream]
    first_block, last_block = start // per_block, -(-stop // per_block)
    words = np.random.Philox(key=seed, counter=first_block).random_raw(4 * (last_block - first_block))
    raw = np.asarray(words, dtype="<u8")
    within = slice(start - first_block * per_block, stop - first_block * per_block)
    if stream == "mk1":
        return _QUANTILES.take(raw.view("<u2")[within])
    bits = np.unpackbits(raw.view(np.uint8), bitorder="little")[within]
    return np.where(bits == 1, np.float32(1), np.float32(-1))


def _quantile_table() -> Float32Array:
    """Q[i] = float32(Φ⁻¹((i + ½) / 65536) / s): standard normal quantiles, scaled by s to unit variance."""
    scale = float.fromhex("0x1.fffeabbbd59e9p-1")
    inverse = NormalDist().inv_cdf
    table = np.array([inverse((i + 0.5) / 65536) / scale for i in range(65536)], dtype="<f4")
    if hashlib.sha256(table.tobytes()).hexdigest() != QUANTILES_SHA256:
        raise RunMismatch("direction stream mk1", "this machine computes another quantile table", "use another Python")
    table.flags.writeable = False
    return table


_QUANTILES = _quantile_table()
