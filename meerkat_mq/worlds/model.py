"""A node's model in a world: a real engine on rows in memory."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from meerkat_mq.config import NodeValuesConfig
from meerkat_mq.core.batches import batch_rows
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.first_order import FirstOrderEngine, first_order_steps
from meerkat_mq.core.path import seeds_of, short_hash
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.step import Engine, Row, local_steps
from meerkat_mq.core.values import Residual
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.model import Follower, StepResult, Stop
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import Values
from meerkat_mq.wire.values import encode_values

Draw = Callable[[str, int, int, int], Float32Array]


class EngineModel(Follower):
    """`runtime.model.Model` on an engine.

    Args:
        run: the run.
        replica: theta, at theta_0.
        name: of the node.
        engine: may be shared by all nodes: whoever steps writes theta first.
        data: rows of the node.
        draw: makes directions.
        take_steps: moves the node's data pointer on; returns where it was.
        values: of a values node: how it steps.
    """

    def __init__(
        self,
        run: RunDescriptor,
        replica: Replica,
        *,
        name: str,
        engine: Engine[Any],
        data: Sequence[Row],
        draw: Draw,
        take_steps: Callable[[str, int], int],
        values: NodeValuesConfig | None = None,
    ) -> None:
        super().__init__(run, replica, None if values is None else Residual(values.codec, run.weights))
        self._name = name
        self._engine = engine
        self._data = data
        self._draw = draw
        self._take_steps = take_steps
        self._values = values
        self.left_out = 0

    @property
    def rows(self) -> int:
        """How many rows of data it has."""
        return len(self._data)

    def step(self, order: StartSteps, stop: Stop, made: int) -> StepResult:
        """The local steps of a round from the present theta, so many."""
        run, data = self._run, self._data
        first = self._take_steps(run.run, order.steps)
        batches = [
            [data[row] for row in batch_rows(run.run_id, self._name, len(data), run.batch_size, step)]
            for step in range(first, first + made)
        ]
        if self._values is not None:
            return self._displace(order, batches, self._values)
        scalars, loss = local_steps(
            self._engine,
            self._replica.theta,
            seeds_of(run.run_id, order.version, order.lane, made * run.perturbations),
            batches,
            stream=run.stream,
            eps=order.eps,
            lr=run.lr,
            draw=self._draw,
        )
        return StepResult(scalars, loss)

    def _displace(self, order: StartSteps, batches: list[list[Row]], values: NodeValuesConfig) -> StepResult:
        assert self._residual is not None
        engine = cast("FirstOrderEngine[Any]", self._engine)
        displacement, loss, made = first_order_steps(engine, self._replica.theta, batches, values)
        blob = encode_values(self._residual.add(order.version, displacement), values.codec)
        return StepResult((), loss, Values(short_hash(blob), len(blob), made), blob)
