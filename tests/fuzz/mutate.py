"""Damaged files for fuzzing: the same seed and number always give the same damage.

Whoever fuzzes another kind of file gives good samples of it; `mutants` does the rest.
"""

import os
import random
import re
from collections.abc import Callable, Iterator, Sequence

COUNT = int(os.environ.get("MEERKAT_FUZZ", "150"))  # mutants of each kind of file

Damage = Callable[[random.Random, bytes], bytes]

_BYTES = (b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x80", b"\r", b"\x1b[2J", b"\x7f", "\u2028".encode())
_WORDS = (
    b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"9" * 5000, b"-1", b"0", b"1.5", b"true", b"null", b"inf", b'""',
    b"[]", b"{}", b'"\\ud83d"', b'"\\u0000"', b'"' + b"x" * 3000 + b'"', b"{x}", b"{{x}}", b"{", b"}", b"2020-01-01",
    b"''", b"'''", b'"""', b"\\", b"#", b",", b"\t", b"\n\n", b'"', b"=", b":", b"[[x]]", b"%s", b"${x}", b"../../x",
)  # fmt: skip
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\w.+-]+')


def _flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _drop(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randint(1, 20) :]


def _insert(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(_BYTES + _WORDS) + data[place:]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    part = data[start : start + rng.randint(1, 60)]
    return data[:start] + part * rng.choice((2, 3, 400)) + data[start:]


def _double_line(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    return b"\n".join(lines)


def _swap_tokens(rng: random.Random, data: bytes) -> bytes:
    """A name, number or string becomes another one of the file: keys come twice, types are exchanged."""
    found = list(_TOKEN.finditer(data))
    if not found:
        return data + b"x"
    target, source = rng.choice(found), rng.choice(found)
    return data[: target.start()] + source[0] + data[target.end() :]


def _swap_type(rng: random.Random, data: bytes) -> bytes:
    found = list(_TOKEN.finditer(data))
    target = rng.choice(found) if found else None
    start, end = (target.start(), target.end()) if target else (0, 0)
    return data[:start] + rng.choice(_WORDS) + data[end:]


def _nest(rng: random.Random, data: bytes) -> bytes:
    depth, (opening, closing) = (
        rng.choice((3, 900, 20_000)),
        rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"{a=", b"}"))),
    )
    found = list(_TOKEN.finditer(data))
    target = rng.choice(found) if found else None
    start, end = (target.start(), target.end()) if target else (0, len(data))
    return data[:start] + opening * depth + data[start:end] + closing * depth + data[end:]


def _encode(rng: random.Random, data: bytes) -> bytes:
    return data.decode(errors="replace").encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7")))


def _line_ends(rng: random.Random, data: bytes) -> bytes:
    return data.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\0", b"")))


DAMAGES: Sequence[Damage] = (
    _flip_bits, _cut, _drop, _insert, _repeat, _double_line, _swap_tokens, _swap_type, _nest, _encode, _line_ends,
)  # fmt: skip


def mutants(name: str, samples: Sequence[bytes], count: int = COUNT) -> Iterator[tuple[int, bytes]]:
    """Damaged copies of the samples, each with the number that makes it again.

    Args:
        name: of the kind of file; another name gives other damage.
        samples: good files, none of them empty.
        count: how many.
    """
    for number in range(count):
        yield number, mutant(name, samples, number)


def mutant(name: str, samples: Sequence[bytes], number: int) -> bytes:
    """The mutant with this number: one sample with one to three damages."""
    rng = random.Random(f"{name} {number}")
    data = rng.choice(samples)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(DAMAGES)(rng, data or b" ")
    return data
