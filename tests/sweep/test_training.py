from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.path import digest
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.toy import QuadraticEngine, toy_mask
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.sweep.training import Federated

MASK = toy_mask(8)
COUNT, NODES = 5, 3


class OutOfMemory(RuntimeError):
    """What an engine's library raises."""


class FailingEngine(QuadraticEngine):
    """Fails at its ninth forward pass."""

    def __init__(self) -> None:
        super().__init__(MASK.size)
        self.passes = 0

    def losses(self, batch: Any) -> Float32Array:
        self.passes += 1
        if self.passes == 9:
            raise OutOfMemory("no memory left")
        return super().losses(batch)


def federated(engine: QuadraticEngine, shares: list[float], samples: list[None]) -> Federated:
    settings = RoundSettings(
        run_id=bytes(range(16)),
        mask_hash=MASK.hash,
        count=COUNT,
        digest_every=COUNT,
        local_steps=1,
        directions=1,
        lr=0.1,
        eps=1e-3,
        min_nodes=NODES,
        fraction=1.0,
        quorum=1.0,
        deadline_s=60.0,
        grace_s=0.0,
    )
    return Federated(
        engine=cast("TransformersEngine", engine),
        mask=MASK,
        settings=settings,
        shards=[[{"seed": number}] for number in range(NODES)],
        batch_size=1,
        evaluation=(),
        every=0,
        report=shares.append,
        sample=lambda: samples.append(None),
    )


def test_what_training_comes_to_and_costs() -> None:
    shares, samples = list[float](), list[None]()
    with capture_logs() as logs:
        trained = federated(QuadraticEngine(MASK.size), shares, samples).train()
    assert logs == []  # drivers of services would say who is in charge
    assert (trained.rounds, trained.passes, trained.refused, trained.ended) == (COUNT, 2 * NODES * COUNT, 0, None)
    assert digest(trained.theta) != digest(MASK.theta_0)
    assert trained.bytes_up == COUNT * 52
    assert trained.bytes_down > COUNT * 52
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(samples) == len(shares) == NODES * COUNT


def test_what_an_engine_raises_ends_the_cell_by_its_name() -> None:
    with pytest.raises(OutOfMemory, match="no memory left"):
        federated(FailingEngine(), [], []).train()
