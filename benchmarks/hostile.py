"""What the benchmarks of hostile nodes share: the demo's task in memory, with some nodes that send what they like."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch

from meerkat_mq.config import NodeValuesConfig
from meerkat_mq.config.rounds import Aggregate
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row
from meerkat_mq.demo.local import node_name
from meerkat_mq.demo.plan import Choices, DemoPlan, make_plan
from meerkat_mq.engines.evaluate import evaluate
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.rounds.guards import Guard
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import UpdateRecord, Verdict
from meerkat_mq.runtime.model import Model, StepResult, Stop
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.worlds.federation import Federation, NodePart
from meerkat_mq.worlds.node import NodeProcess
from meerkat_mq.worlds.quiet import quiet

NODES = 8

Lie = Callable[[StartSteps, StepResult], StepResult]  # what a hostile node sends of its honest local steps
Records = Sequence[Sequence[UpdateRecord]]


class LyingModel:
    """A model whose node lies."""

    def __init__(self, model: Model, lie: Lie) -> None:
        self._model, self._lie = model, lie

    def step(self, order: StartSteps, stop: Stop, made: int) -> StepResult:
        """What the node sends of its local steps."""
        result = self._model.step(order, stop, made)
        assert result is not None
        return self._lie(order, result)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class HostileFederation(Federation):
    """A federation in which some nodes lie."""

    lies: Mapping[str, Lie]

    def make_model(self, node: NodeProcess, run: RunDescriptor) -> Model:
        """The model of a node that joins the run."""
        model = super().make_model(node, run)
        lie = self.lies.get(node.name)
        return model if lie is None else cast("Model", LyingModel(model, lie))


@dataclass(frozen=True)
class Trained:
    """What came of one run: accuracy on held-out rows, and the updates of its rounds."""

    accuracy: float
    records: Records


@cache
def prepared(
    seed: int, rounds: int, lr: float, nodes: int = NODES, local_steps: int = 1
) -> tuple[DemoPlan, Mask, TransformersEngine]:
    """Of one lane; once a process."""
    torch.set_num_threads(1)
    choices = Choices(nodes=nodes, rounds=rounds, local_steps=local_steps, directions=1, lr=lr, seed=seed)
    plan = make_plan(choices)
    loaded = load_model(plan.source)
    mask = make_mask(
        loaded,
        plan.calibration(),
        density=plan.settings.density,
        seed=plan.seed,
        sequences=plan.settings.calibration_sequences,
        length=plan.settings.calibration_tokens,
    )
    return plan, mask, TransformersEngine(loaded, mask, plan.task)


def settings(plan: DemoPlan, mask: Mask, aggregate: Aggregate, run: str, **others: Any) -> RoundSettings:
    """Of one lane, for which all nodes are needed; `run` and the plan's seed decide the directions."""
    rules = plan.rounds
    return RoundSettings(
        run_id=hashlib.sha256(f"{run} {plan.seed}".encode()).digest()[:16],
        mask_hash=mask.hash,
        count=rules.count,
        local_steps=rules.local_steps,
        batch_size=rules.batch_size,
        directions=1,
        lr=rules.lr,
        eps=rules.eps,
        min_nodes=NODES,
        quorum=1.0,
        aggregate=aggregate,
        displacement_reach=rules.displacement_reach,
        max_step=50 * mask.scale,
        weights=mask.size,
        **others,
    )


@quiet()
def train(
    rules: RoundSettings,
    prepared: tuple[DemoPlan, Mask, TransformersEngine],
    shards: Sequence[Sequence[Row]],
    lies: Mapping[str, Lie],
    values: Mapping[str, NodeValuesConfig] | None = None,
) -> Trained:
    """Run a federation of one node a shard; `values` are the values nodes."""
    plan, mask, engine = prepared
    names = [node_name(number) for number in range(len(shards))]
    parts = [
        NodePart(name, engine, rows, values=(values or {}).get(name)) for name, rows in zip(names, shards, strict=True)
    ]
    federation = HostileFederation(rules, mask, parts)
    federation.lies = lies
    federation.start()
    federation.run(until=1e6)
    assert federation.version == rules.count, federation.errors
    engine.write(federation.theta)
    return Trained(evaluate(engine, plan.held_out).accuracy, federation.records)


def share_refused(records: Records, nodes: Iterable[str]) -> float:
    """Of the updates of these nodes."""
    names = set(nodes)
    verdicts = [record.verdict for updates in records for record in updates if record.node in names]
    return sum(verdict != Verdict.ACCEPTED for verdict in verdicts) / max(1, len(verdicts))


def flagged_at(records: Records, rules: RoundSettings, hostile: frozenset[str]) -> int | None:
    """After how many rounds the first of these nodes was flagged; None: never."""
    guard = Guard(rules.guards, rules.directions, cumulative=rules.clips)
    for version, updates in enumerate(records):
        guard.remember(updates)
        if hostile & guard.flagged.keys():
            return version + 1
    return None
