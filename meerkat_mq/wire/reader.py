"""A bounded cursor over untrusted bytes."""

import math
import struct
from typing import Any

from meerkat_mq.errors import BadValue, Truncated


class Reader:
    """Reads forward; every read is checked against what is left."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._offset = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._offset

    def peek(self, count: int) -> memoryview:
        """The next `count` bytes, as a view; they stay the next. Truncated where fewer are left."""
        part = self.take(count)
        self._offset -= count
        return part

    def take(self, count: int) -> memoryview:
        """The next `count` bytes, as a view; likewise."""
        start, end = self._offset, self._offset + count
        if end > len(self._data):
            raise Truncated("frame", f"ends {end - len(self._data)} bytes early")
        self._offset = end
        return self._data[start:end]

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The next fields, by a struct layout."""
        return layout.unpack(self.take(layout.size))

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        """The next `count` little-endian numbers of one struct code."""
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def trim(self, count: int) -> None:
        """Drop the last `count` bytes."""
        self._data = self._data[:-count]

    def end(self) -> None:
        """Raises Truncated where bytes are left over: the frame's lengths do not add up."""
        if self.left:
            raise Truncated("frame", f"has {self.left} bytes too many")


def check(holds: bool, name: str, problem: str) -> None:
    """Refuse, as BadValue, what does not hold."""
    if not holds:
        raise BadValue(name, problem)


def finite(name: str, value: float) -> float:
    """The value; BadValue where it is infinite or NaN."""
    if not math.isfinite(value):
        raise BadValue(name, f"{value} is not finite")
    return value
