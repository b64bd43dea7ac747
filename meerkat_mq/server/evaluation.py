"""Evaluation on held-out data, in a worker thread, by the run's engine."""

import asyncio
from contextlib import nullcontext
from functools import partial

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.engines.evaluate import evaluate
from meerkat_mq.engines.protocol import Setup
from meerkat_mq.engines.registry import entry_of, make_engine, try_out, usable
from meerkat_mq.errors import ConfigError, within
from meerkat_mq.ledger.run import Run
from meerkat_mq.tasks.data import read_rows
from meerkat_mq.tasks.load import task_of
from meerkat_mq.tasks.task import Evaluation, classified


class Evaluator:
    """The server's own model, looked at through theta."""

    def __init__(self, config: ServerConfig, run: Run) -> None:
        """Load model and data; slow.

        Raises:
            MeerkatError: the model does not fit the mask, or the data does not fit the task.
        """
        assert config.evaluation is not None
        name, model, described = config.engine, config.model, run.descriptor.task
        task = None if described is None else task_of(described)
        if task is not None and entry_of(name).task == "needed" and model is None:
            raise ConfigError("evaluation", "needs a [model] section", "add model.source, or drop [evaluation]")
        read = entry_of(name).read if task is None else partial(read_rows, task=task)
        with within("evaluation.data"):
            rows = read(config.evaluation.data)
        setup = Setup(run.mask, task)
        if model is not None:
            setup = Setup(run.mask, task, model.source, model.dtype, model.device)
        with nullcontext() if model is None else within("model.source"):
            self._engine = make_engine(name, setup, "evaluation")
        with within("evaluation.data"):
            self._rows = usable(self._engine, rows)
        try_out(name, self._engine, run.mask.theta_0, self._rows)
        self._figures = classified if task is None else task.evaluation
        self._batch_size = config.evaluation.batch_size

    async def evaluate(self, theta: Float32Array) -> Evaluation:
        """What the task makes of theta."""
        return await asyncio.to_thread(self._evaluate, theta)

    def _evaluate(self, theta: Float32Array) -> Evaluation:
        self._engine.write(theta)
        return evaluate(self._engine, self._rows, self._batch_size, self._figures)
