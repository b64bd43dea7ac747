"""GradIP of nodes with extreme data decays, and VPCS tells them."""

from typing import Any

import pytest

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.worlds.federation import Federation
from tests.worlds.fleet import change, check, fleet, run


def skewed(seed: int, extreme: int, size: int = 6, **changes: Any) -> Federation:
    """A fleet whose first nodes have the rows of one seed each, and the others those of many."""
    config = EarlyStoppingConfig(by="vpcs", calibration_steps=200)
    plain: dict[str, Any] = {
        "steps": 10,
        "lr": 1.0,
        "measured": True,
        "early_stopping": config,
        "count": 3,
        "run_id": bytes([seed] * 16),
    }
    federation = fleet(size, **plain | changes)
    for number, name in enumerate(federation.nodes):
        own = 1000 * (size * seed + number)
        change(federation, name, rows=[{"seed": own + (0 if number < extreme else row)} for row in range(40)])
    return federation


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("extreme", [0, 2])
def test_gradip_of_nodes_with_extreme_data_decays_and_vpcs_tells_them(extreme: int, seed: int) -> None:
    federation = skewed(seed, extreme)
    federation.start()
    run(federation)
    check(federation)
    assert {found.node for found in federation.judgements if found.early_stopped} == {f"n{k}" for k in range(extreme)}
    lengths = [{record.node: len(record.scalars) for record in records} for records in federation.records]
    assert set(lengths[0].values()) == {200}
    for later in lengths[1:]:
        assert later == {f"n{k}": 1 if k < extreme else 10 for k in range(6)}


@pytest.mark.parametrize(
    "changes",
    [
        {"perturbations": 3},
        {"lanes": 2, "aggregate": "trimmed-mean"},
        {"early_stopping": EarlyStoppingConfig(by="random", calibration_steps=20, every=2)},
        {"steps": 1},
    ],
    ids=str,
)
def test_a_server_that_crashes_in_a_calibration_changes_nothing(changes: dict[str, Any]) -> None:
    steady, stopped = (skewed(1, 2, count=5, commit_s=0.002, **changes) for _ in range(2))
    stopped.clock.at(0.022, stopped.kill_server)
    stopped.clock.at(0.5, stopped.start_server)
    for federation in (steady, stopped):
        federation.start()
        run(federation)
        check(federation)
    assert stopped.store.term == 2
    assert stopped.entries == steady.entries
    assert stopped.judgements == steady.judgements
