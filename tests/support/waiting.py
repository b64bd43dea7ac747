"""Waiting on conditions instead of sleeping."""

import asyncio
from collections.abc import Callable

patience = 1.0  # a factor: more for a slow broker


async def until(condition: Callable[[], object], *, within_s: float = 10.0) -> None:
    """Wait until the condition holds; AssertionError where it does not in time."""
    deadline = asyncio.get_running_loop().time() + within_s * patience
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {within_s * patience} s"
        await asyncio.sleep(0.005)
