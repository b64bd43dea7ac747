"""Evaluation on held-out data, in a worker thread. Only a server with a model imports this, and torch."""

import asyncio

import structlog

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.evaluate import Evaluation, evaluate
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.errors import ConfigError, within
from meerkat_mq.tasks.data import read_rows
from meerkat_mq.wire.descriptor import Task


class Evaluator:
    """The server's own model, looked at through theta."""

    def __init__(self, config: ServerConfig, mask: Mask, task: Task) -> None:
        """Load model and data; slow.

        Raises:
            MeerkatError: the model does not fit the mask, or the data does not fit the task.
        """
        if config.model is None or config.evaluation is None:
            raise ConfigError("evaluation", "needs a [model] section", "add model.source, or drop [evaluation]")
        with within("evaluation.data"):
            rows = read_rows(config.evaluation.data, task)
        with within("model.source"):
            loaded = load_model(config.model.source, dtype=config.model.dtype, device=config.model.device)
            for note in loaded.notes:
                structlog.get_logger().warning("about the model", note=note)
            self._engine = TransformersEngine(loaded, mask, task)
            self._engine.check(mask)
        with within("evaluation.data"):
            self._rows = self._engine.usable(rows)
        self._batch_size = config.evaluation.batch_size

    async def evaluate(self, theta: Float32Array) -> Evaluation:
        """Accuracy and loss of theta."""
        return await asyncio.to_thread(self._evaluate, theta)

    def _evaluate(self, theta: Float32Array) -> Evaluation:
        self._engine.write(theta)
        return evaluate(self._engine, self._rows, self._batch_size)
