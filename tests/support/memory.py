"""What a refusal costs."""

import tracemalloc
from collections.abc import Callable

import pytest


def peak_of(action: Callable[[], object], refusal: type[Exception], match: str | None = None) -> int:
    """Bytes that an action allocated at most before it was refused, in words that match."""
    tracemalloc.start()
    with pytest.raises(refusal, match=match):
        action()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak
