"""Random fault schedules: whatever happens, the ledger is right, and once it is over, the run ends with equal bits."""

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meerkat_mq.rounds.memory import MemoryFederation, MemoryNode
from tests.rounds.fleet import Network, check, check_ledger, fleet

SCHEDULES = os.environ.get("MEERKAT_SCHEDULES")  # how many; by default 100, the same ones each time
PEACE_AT = 40.0


@dataclass(frozen=True)
class Fault:
    """Something that somebody does to a federation at a virtual time."""

    at: float
    what: str
    whom: int
    detail: float

    def strike(self, federation: MemoryFederation) -> None:
        name = f"n{self.whom % len(federation.nodes)}"
        node = federation.nodes[name]
        if self.what == "server":
            self._strike_server(federation)
        elif not node.alive:
            federation.start_node(name)
        elif self.what == "crash":
            federation.crash(name, will_s=5 * self.detail)
        elif self.what == "freeze" and node.held is None:
            federation.freeze(name)
        elif self.what == "freeze":
            federation.thaw(name)
        elif self.what == "leave":
            federation.leave(name)
        elif self.what == "flip":
            self._flip(federation, node)
        else:
            federation.reconnect(name)

    def _flip(self, federation: MemoryFederation, node: MemoryNode) -> None:
        """Once a node, and where a digest will tell: another theta."""
        told = federation.digest_every == 1 and node.machine.version < federation.settings.count
        if told and not federation.counts[node.name, "flipped"]:
            federation.counts[node.name, "flipped"] += 1
            node.replica.theta = node.replica.theta + np.float32(1)

    def _strike_server(self, federation: MemoryFederation) -> None:
        if federation.server_up:
            federation.crash_server()
        else:
            backup = self.whom == 0 and federation.entries
            federation.start_server(int(self.detail * len(federation.entries)) if backup else None)


faults = st.builds(
    Fault,
    st.floats(0, PEACE_AT),
    st.sampled_from(["crash", "crash", "freeze", "leave", "reconnect", "flip", "server", "server"]),
    st.integers(0, 5),
    st.floats(0, 1),
)
rules = st.fixed_dictionaries(
    {
        "count": st.integers(2, 12),
        "steps": st.sampled_from([1, 1, 3]),
        "lanes": st.sampled_from([1, 2]),
        "min_nodes": st.integers(2, 4),
        "fraction": st.sampled_from([1.0, 1.0, 0.5]),
        "quorum": st.sampled_from([0.5, 0.75, 1.0]),
        "deadline_s": st.sampled_from([1.0, 4.0]),
        "grace_s": st.sampled_from([0.0, 1.0]),
        "weigh_by_rows": st.booleans(),
        "stream": st.sampled_from(["mk1", "rademacher"]),
        "digest_every": st.sampled_from([1, 3]),
        "commit_s": st.sampled_from([0.0, 0.05]),
    }
)
weather = st.builds(
    Network,
    st.integers(0, 2**32),
    loss=st.sampled_from([0.0, 0.1, 0.4]),
    repeat=st.sampled_from([0.0, 0.3]),
    slow_s=st.sampled_from([0.0, 0.3, 3.0]),
)


def make_peace(federation: MemoryFederation, network: Network) -> None:
    """Everybody is there, and nothing is lost any more."""
    network.heal()
    if not federation.server_up:
        federation.start_server()
    for name, node in federation.nodes.items():
        if node.alive:
            federation.thaw(name)
            federation.reconnect(name)
        else:
            federation.start_node(name)


@pytest.mark.timeout(0 if SCHEDULES else 60)
@settings(
    max_examples=int(SCHEDULES or 100),
    deadline=None,
    derandomize=not SCHEDULES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    st.integers(4, 6),
    rules,
    weather,
    st.lists(faults, max_size=20),
    st.lists(st.floats(0.01, 2), min_size=6, max_size=6),
)
def test_any_schedule_of_faults(
    size: int, rules: dict[str, Any], network: Network, schedule: list[Fault], step_s: list[float]
) -> None:
    lanes = rules["lanes"] if rules["fraction"] * rules["min_nodes"] > 1 else 1
    federation = fleet(size, deliver=network, **rules | {"lanes": lanes})
    for node, seconds in zip(federation.nodes.values(), step_s, strict=False):
        node.step_s = seconds
    federation.start()
    for fault in schedule:
        federation.at(fault.at, partial(fault.strike, federation))
    federation.settle(PEACE_AT)
    check_ledger(federation)
    make_peace(federation, network)
    federation.run(PEACE_AT + 10 * rules["deadline_s"] + 10.0 * rules["count"])
    assert federation.server.finished
    federation.settle(10.0)
    check(federation)
