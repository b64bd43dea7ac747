"""⟨g_p, z⟩ of a round's directions, computed while its nodes work: neither the loop nor the ledger waits for it."""

import asyncio
from collections.abc import Callable
from itertools import takewhile

from meerkat_mq.core.gradip import by_lane, each_inner_product
from meerkat_mq.ledger.rows import Products
from meerkat_mq.ledger.run import Run
from meerkat_mq.rounds import events as e


class Measurer:
    """Measures what it was asked for last; what that superseded is given up at the next direction."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._g_p = run.mask.g_p if run.settings.measured else None
        self._newest: e.MeasureDirections | None = None
        self._asked = asyncio.Event()

    def put(self, order: e.MeasureDirections) -> None:
        """Measure this next."""
        self._newest = order
        self._asked.set()

    async def run(self, tell: Callable[[e.DirectionsMeasured], None]) -> None:
        """Work until cancelled; `tell` is called on the event loop."""
        try:
            while True:
                await self._asked.wait()
                self._asked.clear()
                order = self._newest
                assert order is not None
                products = await asyncio.to_thread(self._measure, order)
                if order is self._newest and products is not None:
                    tell(e.DirectionsMeasured(asyncio.get_running_loop().time(), order.version, products))
        finally:
            self._newest = None  # the process ends no sooner than its threads

    def _measure(self, order: e.MeasureDirections) -> Products | None:
        run = self._run.descriptor
        assert self._g_p is not None
        each = each_inner_product(
            self._g_p, run.run_id, order.version, lanes=order.lanes, steps=order.steps, stream=run.stream
        )
        found = tuple(takewhile(lambda _: order is self._newest, each))
        return by_lane(found, order.lanes) if order is self._newest else None
