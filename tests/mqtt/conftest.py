"""Every test here must leave nothing behind: no task, no socket, no error in asyncio's log."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest


@pytest.fixture(autouse=True)
async def nothing_left_behind() -> AsyncIterator[None]:
    """Fail on leaked tasks and connections, and on what asyncio would only log."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    before = {id(task) for task in asyncio.all_tasks()}
    sockets = _connections()
    yield
    for _ in range(50):
        left = [task for task in asyncio.all_tasks() - {asyncio.current_task()} if id(task) not in before]
        if not left and _connections() <= sockets:
            break
        await asyncio.sleep(0.01)
    assert not left
    assert _connections() <= sockets
    assert not complaints


def _connections() -> int:
    return sum(connection.status != psutil.CONN_LISTEN for connection in psutil.Process().net_connections("tcp"))
