"""Damaged JSON objects for fuzzing: still JSON, but with other keys, types, numbers, names and depths.

The same seed and number always give the same damage. `mutate` damages the bytes; this damages what they say.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Keys = Mapping[str, Sequence[Any]]
Place = tuple[Any, Any]  # a container, and the key or index of a value in it
Damage = Callable[[random.Random, dict[str, Any], Keys], None]

ELSEWHERE = "../../outside/secret.json"  # what no mutant may lead to; it is there
_AGAIN = "\0again"

NONSENSE: Sequence[Any] = (
    *(None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), -float("inf")),
    *(1000, 10**5, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**400, -(10**9)),
    *("", " ", "x", "x" * 5000, "\0", "\ud83d", "\x1b[2J", "\u2028", "é", "1", "true", "{0}", "%s", "(", "a\nb"),
    *(ELSEWHERE, "/etc/passwd", "/dev/zero", "../..", ".", "hub/name", "http://127.0.0.1:9/x", "model.safetensors"),
    *("float8_e4m3fn", "torch.float16", "bool", "int64", "complex64", "auto", "os", "eval", "__init__"),
    *([], {}, [[]], [None], [-1], [1, 2], ["x"], {"a": 1}, {"": None}, {"type": "x"}, [[0, 0]] * 3, ["x"] * 2000),
)  # fmt: skip


def _places(table: dict[str, Any]) -> list[Place]:
    """Every value, by what holds it. Values near the top come as often as all those below them."""
    waiting: list[tuple[int, Any]] = [(0, table)]
    found: list[tuple[int, Place]] = []
    while waiting:
        depth, inside = waiting.pop()
        for key, value in list(inside.items() if isinstance(inside, dict) else enumerate(inside)):
            found.append((depth, (inside, key)))
            if isinstance(value, dict | list) and depth < 8:
                waiting.append((depth + 1, value))
    top = [place for depth, place in found if depth <= 1]
    return [place for _, place in found] + top * (1 + len(found) // max(1, len(top)))


def _pick(rng: random.Random, table: dict[str, Any]) -> Place:
    return rng.choice(_places(table) or [(table, "x")])


def _nonsense(rng: random.Random, table: dict[str, Any], keys: Keys) -> None:
    inside, key = _pick(rng, table)
    inside[key] = copy.deepcopy(rng.choice(NONSENSE))


def _likely(rng: random.Random, table: dict[str, Any], keys: Keys) -> None:
    """A key that libraries know, with a value that they would believe."""
    key = rng.choice(list(keys))
    table[key] = copy.deepcopy(rng.choice(keys[key]))


def _drop(rng: random.Random, table: dict[str, Any], keys: Keys) -> None:
    inside, key = _pick(rng, table)
    if isinstance(inside, list) or key in inside:
        del inside[key]


def _swap(rng: random.Random, table: dict[str, Any], keys: Keys) -> None:
    (first, one), (second, other) = _pick(rng, table), _pick(rng, table)
    second[other] = copy.deepcopy(first.get(one) if isinstance(first, dict) else first[one])


def _rename(rng: random.Random, table: dict[str, Any], keys: Keys) -> None:
    inside, key = _pick(rng, table)
    if isinstance(inside, dict):
        inside[str(rng.choice(("x", "", "\ud83d", "a.b", "self", "__class__", "0", *keys)))] = inside.pop(key, None)


def _again(rng: random.Random, table: dict[str, Any], keys: Keys) -> None:
    inside, key = _pick(rng, table)
    if isinstance(inside, dict):
        inside[f"{_AGAIN}{key}"] = copy.deepcopy(rng.choice(NONSENSE))


def _nest(rng: random.Random, table: dict[str, Any], keys: Keys) -> None:
    inside, key = _pick(rng, table)
    value = inside[key] if isinstance(inside, list) else inside.get(key)
    for _ in range(rng.choice((1, 2, 60, 130, 400))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    inside[key] = value


def _wrong_type(rng: random.Random, table: dict[str, Any], keys: Keys) -> None:
    inside, key = _pick(rng, table)
    value = inside[key] if isinstance(inside, list) else inside.get(key)
    inside[key] = rng.choice((str(value)[:200], [value], {"x": value}, None, bool(value), -1))


def _larger(rng: random.Random, table: dict[str, Any], keys: Keys) -> None:
    """A number that a model would be built from."""
    numbers = [(box, key) for box, key in _places(table) if type(box[key]) in (int, float)]
    if numbers:
        inside, key = rng.choice(numbers)
        value = inside[key]
        inside[key] = rng.choice((value + 1, value * 2, value * 1000, -value, value * 10**9, value // 3, value - 1))


DAMAGES: Sequence[Damage] = (
    _nonsense, _nonsense, _likely, _likely, _likely, _drop, _swap, _rename, _again, _nest, _wrong_type, _larger,
)  # fmt: skip


def json_mutant(name: str, sample: Mapping[str, Any], keys: Keys, number: int) -> bytes:
    """The mutant with this number: the sample with one to three damages.

    Args:
        name: of the kind of file; another name gives other damage.
        sample: a good object.
        keys: that libraries know in such a file, each with values worth trying.
        number: which.
    """
    rng = random.Random(f"{name} {number} json")
    table = copy.deepcopy(dict(sample))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(DAMAGES)(rng, table, keys)
    text = json.dumps(table, indent=rng.choice((None, 2)), ensure_ascii=rng.random() < 0.9)
    return text.replace(json.dumps(_AGAIN)[:-1], '"').encode(errors="surrogatepass")


def json_mutants(name: str, sample: Mapping[str, Any], keys: Keys, count: int) -> Iterator[tuple[int, bytes]]:
    """Damaged copies of the sample, each with the number that makes it again."""
    for number in range(count):
        yield number, json_mutant(name, sample, keys, number)
