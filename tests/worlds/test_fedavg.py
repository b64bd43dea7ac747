"""An entry is FedAvg of the nodes' end points, written as directions."""

from typing import Any

import numpy as np
import pytest

from meerkat_mq.core.batches import batch_rows
from meerkat_mq.core.directions import direction
from meerkat_mq.core.path import seed_for
from meerkat_mq.core.step import projected_gradient
from meerkat_mq.rounds.policy import lane_of
from meerkat_mq.worlds.federation import Federation, NodePart
from tests.rounds.support import RUN
from tests.worlds.fleet import BATCH, fleet, run


def end_point(federation: Federation, node: NodePart, slot: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Where a node's own walk from theta_0 ends."""
    rules, theta = federation.settings, np.zeros(federation.theta.size, np.float32)
    for step in range(rules.local_steps):
        z = direction(rules.stream, seed_for(RUN, 0, lane_of(slot, rules.directions), step), 0, theta.size)
        rows = [node.rows[number] for number in batch_rows(RUN, node.name, len(node.rows), BATCH, step)]
        g, _ = projected_gradient(node.engine, theta, z, rules.eps, node.engine.prepare(rows))
        theta = theta - np.float32(rules.lr * g) * z
    return theta.astype(np.float64)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lanes": 2},
        {"lanes": 4},
        {"weigh_by_rows": True},
        {"lanes": 2, "weigh_by_rows": True, "stream": "rademacher"},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 10])
def test_an_entry_is_the_mean_of_the_end_points(steps: int, changes: dict[str, Any]) -> None:
    federation = fleet(steps=steps, count=1, lr=0.5, **changes)
    federation.start()
    run(federation)
    records = federation.records[0]
    assert len(records) == 4
    weights = [len(federation.parts[record.node].rows) if changes.get("weigh_by_rows") else 1 for record in records]
    ends = [end_point(federation, federation.parts[record.node], record.slot) for record in records]
    mean = np.average(ends, axis=0, weights=weights)
    np.testing.assert_allclose(federation.theta, mean, atol=2e-6 * float(np.abs(mean).max()))
    assert np.abs(ends[0] - mean).max() > 0.05 * np.abs(mean).max()  # the nodes do walk apart
