"""The clock of a machine: rings when `wake_at` comes, whatever else happens."""

import asyncio
from collections.abc import Callable


class Alarm:
    """Waits for a machine's `wake_at` and calls `ring`; `changed` tells it to look again."""

    def __init__(self, wake_at: Callable[[], float | None], ring: Callable[[], None]) -> None:
        self._wake_at = wake_at
        self._ring = ring
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """The machine may want to wake at another time."""
        self._changed.set()

    async def run(self) -> None:
        """Ring until cancelled; times are those of the event loop's clock."""
        clock = asyncio.get_running_loop().time
        while True:
            self._changed.clear()
            wake_at = self._wake_at()
            try:
                async with asyncio.timeout_at(wake_at):
                    await self._changed.wait()
            except TimeoutError:
                if wake_at is not None and clock() >= wake_at:
                    self._ring()
