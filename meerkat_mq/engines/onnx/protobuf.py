"""Protocol Buffers, as far as ONNX files need them: the fields of a message, and messages appended to one.

A field is a key (its number, and a wire type: 0, 1, 2 and 5 are in use) and a value. A message that comes twice in
another one is merged with the first, and its lists are joined: so what is appended to a file is added to its graph.
"""

from collections.abc import Iterator

Field = tuple[int, int | bytes | None]  # its number, and what is in it; None: a number of fixed size


def fields(data: bytes) -> Iterator[Field]:
    """The fields of a message, in their order.

    Raises:
        ValueError, IndexError: a group, or what ends beyond the message.
    """
    place = 0
    while place < len(data):
        key, place = _number(data, place)
        kind = key & 7
        if kind == 2:
            size, place = _number(data, place)
            if size > len(data) - place:
                raise ValueError("it is cut short")
            yield key >> 3, data[place : place + size]
            place += size
        elif kind == 0:
            value, place = _number(data, place)
            yield key >> 3, value
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
            if place > len(data):
                raise ValueError("it is cut short")
            yield key >> 3, None
        else:
            raise ValueError(f"wire type {kind}")


def message(inner: int | bytes | None) -> bytes:
    """What is in a field that holds bytes, or `ValueError`."""
    if not isinstance(inner, bytes):
        raise ValueError("a number where a message must be")
    return inner


def field(number: int, value: int | bytes) -> bytes:
    """A field as bytes."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _number(data: bytes, place: int) -> tuple[int, int]:
    """A variable-length number, of ten bytes at most, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number without an end")


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low]) if not rest else bytes([low | 128]) + _varint(rest)
