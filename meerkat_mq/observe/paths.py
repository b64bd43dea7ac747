"""GradIP as people see it: its magnitude over a node's local steps, in bounded memory however long the run."""

from typing import Final

from meerkat_mq.observe.charts import Point

MOST_SPANS: Final = 512  # even


class Magnitudes:
    """|GradIP| of a node: means over spans of as many steps each; when there are too many, two become one."""

    def __init__(self) -> None:
        self._span = 1
        self._means: list[float] = []
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """Take the GradIP of the node's next local step."""
        self._sum, self._count = self._sum + abs(value), self._count + 1
        if self._count < self._span:
            return
        self._means.append(self._sum / self._span)
        self._sum, self._count = 0.0, 0
        if len(self._means) == MOST_SPANS:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(first + second) / 2 for first, second in pairs]
            self._span *= 2

    @property
    def points(self) -> list[Point]:
        """(local step of the node, mean up to it from the point before)."""
        return [(self._span * number, mean) for number, mean in enumerate(self._means, start=1)]
