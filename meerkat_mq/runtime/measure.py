"""What is measured of a round: ⟨g_p, z⟩ of its directions while its nodes work, its displacements when it closes."""

from collections.abc import Callable
from itertools import takewhile

from meerkat_mq.core.gradip import by_lane, each_inner_product
from meerkat_mq.ledger.run import Run
from meerkat_mq.ledger.store import Products
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import RoundOutcome
from meerkat_mq.runtime.ports import Clock, Compute
from meerkat_mq.runtime.steps import Sequence, Steps, work
from meerkat_mq.runtime.writer import MeasureValues


class Measurer:
    """Measures directions: what it was asked for last; what that superseded is given up at the next direction."""

    def __init__(self, run: Run, compute: Compute, clock: Clock, tell: Callable[[e.DirectionsMeasured], None]) -> None:
        self._run = run
        self._g_p = run.mask.g_p if run.settings.measured else None
        self._compute = compute
        self._clock = clock
        self._tell = tell
        self._newest: e.MeasureDirections | None = None

    def put(self, order: e.MeasureDirections) -> None:
        """Measure this next."""
        self._newest = order
        Sequence(self._answer(order))

    def stop(self) -> None:
        """Give everything up: a process ends no sooner than its threads."""
        self._newest = None

    def _answer(self, order: e.MeasureDirections) -> Steps[None]:
        products = yield from work(self._compute, self._measure, order)
        if order is self._newest and products is not None:
            self._tell(e.DirectionsMeasured(self._clock.now(), order.version, products))

    def _measure(self, order: e.MeasureDirections) -> Products | None:
        if order is not self._newest:
            return None  # not one direction of what was superseded before it began
        run = self._run.descriptor
        assert self._g_p is not None
        each = each_inner_product(
            self._g_p, run.run_id, order.version, lanes=order.lanes, steps=order.steps, stream=run.stream
        )
        found = tuple(takewhile(lambda _: order is self._newest, each))
        return by_lane(found, order.lanes) if order is self._newest else None


def judged(
    order: e.JudgeRound, settings: RoundSettings, put: Callable[[MeasureValues], None], others: Compute
) -> Steps[RoundOutcome]:
    """Have the ledger writer measure the displacements of a round, where it has any to compare; then judge it."""
    records = order.records
    if any(map(settings.compares, records)):
        records = yield lambda done, _: put(MeasureValues(records, done))
    return (yield from work(others, order.judge, records))
