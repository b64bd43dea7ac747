"""What a node's owner lets a server ask of it: the section `[policy]` of node.toml, judged before anything is done.

Theory. A server chooses the mask, the directions, the rows' order (by the run id), theta (by its entries) and the batch
size. Each projected gradient is one linear measurement of the batch's gradient on the mask. A server that measures one
batch along as many directions as the gradient has unknowns solves for it by least squares; on one weight of each
token's embedding, that gradient says which tokens the batch holds. The loss of an update is a measurement too: between
two updates, the server moves theta along a direction of its choice, and the difference of their losses is the
gradient's product with that. So the owner bounds what enters a measurement (the kinds of weights, the rows of a batch)
and how many measurements there are of a row: `max_directions` a day, counted by the node itself and kept in its state
folder, over all runs.

A row is in at most ⌊p / rows⌋ + 2 of the batches of p consecutive rows, because each epoch has it once. A local step
gives K projected gradients, and its update a loss. So s local steps of one run measure a row along at most
(K + 1)·(2 + s·min(1, batch / rows)) directions.

What the node fetches has a budget too: a server that names one new mask after another would have it download for ever.

The rows of the toy engine are seeds, and nobody's: `min_batch` and `max_directions` do not apply to them.
"""

from dataclasses import dataclass
from typing import Final

from meerkat_mq.config import PolicyConfig
from meerkat_mq.engines.registry import ENGINES
from meerkat_mq.errors import PolicyRefused, SpentToday
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.model import Model, NodeStore
from meerkat_mq.runtime.ports import Compute
from meerkat_mq.runtime.steps import Steps, work
from meerkat_mq.tasks.load import load_task, task_of
from meerkat_mq.tasks.task import Task
from meerkat_mq.wire.descriptor import RunDescriptor

BYTES_A_WEIGHT: Final = 12  # of a decoded mask: an index, theta_0 and g_p
_REMEDY: Final = "change the key in node.toml only if you trust whoever runs the server (docs/policy.md)"


@dataclass(frozen=True, slots=True)
class NodePolicy:
    """The limits of one node.

    Attributes:
        config: as its owner wrote them.
        tasks: that it works on; None: any.
    """

    config: PolicyConfig
    tasks: tuple[Task, ...] | None = None

    @classmethod
    def of(cls, config: PolicyConfig) -> "NodePolicy":
        """With the tasks that the section names; TaskError where one cannot be read."""
        return cls(config, None if config.tasks is None else tuple(map(load_task, config.tasks)))

    def check_run(self, run: RunDescriptor) -> None:
        """Judge a descriptor, before the mask is fetched.

        Raises:
            PolicyRefused: names the key.
        """
        config, size = self.config, max(run.mask_bytes, BYTES_A_WEIGHT * run.weights)
        if config.mask not in (None, run.mask):
            raise _refused("mask", f"the run's mask has the hash {run.mask}, and this node takes {config.mask} alone")
        _at_most("max_weights", config.max_weights, "weights in the run's mask", run.weights)
        _at_most("max_mask_bytes", config.max_mask_bytes, "bytes of the run's mask", size)
        if self.tasks is not None and (run.task is None or task_of(run.task) not in self.tasks):
            raise _refused("tasks", "the run's task is none of those that this node works on, word for word")
        _at_most("max_batch", config.max_batch, "rows of a batch", run.batch_size)
        if run.task is not None:
            _at_most(
                "max_tokens", config.max_tokens, "tokens of a row, by the run's task", task_of(run.task).max_tokens
            )
        _at_most("max_local_steps", config.max_local_steps, "local steps of the run", run.local_steps)
        self._check_eps(run.eps)
        _at_least("min_lr", config.min_lr, "lr", run.lr)
        _at_most("max_lr", config.max_lr, "lr", run.lr)
        if not _is_public(run):
            _at_least("min_batch", config.min_batch, "rows of a batch", run.batch_size)

    def check_model(self, run: RunDescriptor, model: Model) -> None:
        """Judge the mask by the node's own model, and the batch by its own rows.

        Raises:
            PolicyRefused: names the key.
        """
        for kind, name in model.kinds.items():
            if kind not in self.config.kinds:
                allowed = ", ".join(self.config.kinds)
                raise _refused("kinds", f"the run's mask holds {name}, of the kind {kind}; this node takes {allowed}")
        if not _is_public(run):
            _at_least("min_batch", self.config.min_batch, "different rows of a batch", _distinct(run, model.rows))

    def admit(
        self, run: RunDescriptor, model: Model, order: StartSteps, store: NodeStore, compute: Compute
    ) -> Steps[None]:
        """Judge what a round asks for, and count its directions.

        Raises:
            PolicyRefused: names the key; nothing was counted.
        """
        _at_most("max_local_steps", self.config.max_local_steps, "local steps of a round", order.steps)
        self._check_eps(order.eps)
        if _is_public(run):
            return
        self.check_model(run, model)  # rows may have gone
        first, more = measurements(run, model.rows, order.steps)
        most = self.config.max_directions
        if not (yield from work(compute, store.spend, run.run, first, more, float(most))):
            problem = f"a row would be measured along more than {most:,} directions today"
            raise _refused("max_directions", problem)

    def count_fetch(self, size: int, store: NodeStore) -> None:
        """Count so many bytes of a blob that is to be fetched; blocks.

        Raises:
            SpentToday: they are too many; nothing was counted.
        """
        most = self.config.max_day_bytes
        if not store.fetch(size, most):
            problem = f"with {size:,} bytes more, this node would have fetched more than {most:,} today"
            raise SpentToday("policy.max_day_bytes", problem, _REMEDY)

    def _check_eps(self, eps: float) -> None:
        _at_least("min_eps", self.config.min_eps, "eps", eps)
        _at_most("max_eps", self.config.max_eps, "eps", eps)


DEFAULTS: Final = NodePolicy(PolicyConfig())


def measurements(run: RunDescriptor, rows: int, steps: int) -> tuple[float, float]:
    """Directions along which local steps measure a row, at most: once a run and day, and more by these steps."""
    each = run.perturbations + 1
    return 2.0 * each, each * steps * _distinct(run, rows) / rows


def _is_public(run: RunDescriptor) -> bool:
    return run.engine in ENGINES and ENGINES[run.engine].public_rows


def _distinct(run: RunDescriptor, rows: int) -> int:
    """How many different rows a batch has."""
    return min(run.batch_size, rows)


def _refused(key: str, problem: str) -> PolicyRefused:
    return PolicyRefused(f"policy.{key}", problem, _REMEDY)


def _at_most(key: str, limit: float, what: str, found: float) -> None:
    if found > limit:
        raise _refused(key, f"{what}: {_number(found)} is more than this node's {_number(limit)}")


def _at_least(key: str, limit: float, what: str, found: float) -> None:
    if found < limit:
        raise _refused(key, f"{what}: {_number(found)} is less than this node's {_number(limit)}")


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
