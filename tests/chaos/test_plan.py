"""Plans: what they may say, what their schedule is, and one line for what they must not say."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.chaos.faults import FAULTS
from meerkat_mq.chaos.plan import FEDERATION, REST_S, Plan, Strike, is_core, load_plan, shipped
from meerkat_mq.errors import ConfigError

KILL: dict[str, Any] = {"fault": "sigkill", "at": 1}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(text: str, *faults: dict[str, Any], seconds: float | None = None) -> Plan:
        tables = "".join(
            "[[faults]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in fault.items())
            for fault in faults
        )
        (tmp_path / "plan.toml").write_text(f"{text}\n{tables}")
        return load_plan(str(tmp_path / "plan.toml"), out=tmp_path / "out", seconds=seconds)

    return load


def when(plan: Plan) -> list[tuple[float, str, str]]:
    return [(round(strike.at, 6), strike.fault.name, strike.target) for strike in plan.strikes]


def overlap(one: Strike, other: Strike) -> bool:
    return one.at < other.at + other.for_s + REST_S and other.at < one.at + one.for_s + REST_S


# --- shipped plans ---


def test_the_shipped_plans_are_those_that_are_promised() -> None:
    assert shipped() == [
        "broker-restart",
        "cloned-node",
        "everything",
        "field",
        "flaky-wifi",
        "poisoned-node",
        "power-cuts",
        "server-crash",
        "split-brain",
    ]


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_plan_is_valid_at_every_length(name: str, tmp_path: Path) -> None:
    for seconds in (None, 30, 60):
        plan = load_plan(name, out=tmp_path, seconds=seconds)
        assert plan.name == name
        assert len(plan.nodes) == (9 if name == "everything" else 8)
        assert plan.strikes


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_plan_can_take_what_comes(name: str, tmp_path: Path) -> None:
    waits, takes = (load_plan(name, out=tmp_path, seconds=60, buffered=buffered) for buffered in (False, True))
    assert waits.server is not None
    assert takes.server is not None
    rounds = takes.server.rounds
    assert (rounds.mode, rounds.buffer_size, rounds.max_staleness) == ("buffered", 4, 8)
    assert rounds.count > 4 * waits.server.rounds.count  # a quiet machine closes one every 51 ms, not every 200
    assert takes.strikes == waits.strikes


def test_what_a_plan_says_of_its_buffer_stays(tmp_path: Path) -> None:
    text = '[federation.rounds]\nbuffer_size = 3\n[[faults]]\nfault = "sigkill"\nat = 1\n'
    (tmp_path / "plan.toml").write_text(text)
    plan = load_plan(str(tmp_path / "plan.toml"), out=tmp_path, buffered=True)
    assert plan.server is not None
    assert (plan.server.rounds.mode, plan.server.rounds.buffer_size) == ("buffered", 3)


def test_a_federation_that_somebody_else_configured_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(f'{ATTACH}nodes.a = {{ pid = 4711 }}\n[[faults]]\nfault = "sigkill"\nat = 1\n')
    with pytest.raises(ConfigError, match="--buffered: is for a federation that the drill configures"):
        load_plan(str(tmp_path / "plan.toml"), out=tmp_path, buffered=True)


def test_everything_is_every_fault_even_within_a_minute(tmp_path: Path) -> None:
    plan = load_plan("everything", out=tmp_path, seconds=60)
    assert {strike.fault.name for strike in plan.strikes} == FAULTS.keys()
    assert {strike.shown for strike in plan.strikes} > {"broker", "server", "link:server"}


# --- schedules ---


def test_a_schedule_comes_from_its_seed(load: Any) -> None:
    faults = [{"fault": "sigkill", "every": 5}, {"fault": "reset", "between": [10, 40]}]
    assert when(load("seed = 1", *faults)) == when(load("seed = 1", *faults))
    assert when(load("seed = 1", *faults)) != when(load("seed = 2", *faults))


def test_moments_are_what_the_plan_says(load: Any) -> None:
    plan = load(
        "duration_s = 60",
        {"fault": "sigkill", "target": "node-0", "at": [3, 20]},
        {"fault": "reset", "target": "link:node-1", "every": 10},
        {"fault": "freeze", "target": "link:node-2", "between": [30, 40], "every": 5, "for_s": 1},
        {"fault": "broker-kill", "between": [5, 6]},
    )
    by_target: dict[str, list[float]] = {}
    for at, _, target in when(plan):
        by_target.setdefault(target, []).append(at)
    assert by_target["node-0"] == [3, 20]
    assert len(by_target["node-1"]) == 6
    assert len(by_target["node-2"]) == 2
    assert 30 <= by_target["node-2"][0] < 35
    assert 5 <= by_target["broker"][0] <= 6


def test_seconds_scale_the_moments_but_not_the_faults(load: Any) -> None:
    faults = [KILL | {"at": 30, "target": "node-0"}, {"fault": "reset", "every": 10, "target": "link:node-1"}]
    plan = load("duration_s = 60", *faults, seconds=20)
    assert (20.0 - plan.file.duration_s, [one.at for one in plan.strikes if one.target == "node-0"]) == (0, [10])
    assert len([one for one in plan.strikes if one.target == "node-1"]) == 2
    assert {one.for_s for one in plan.strikes} == {3.0}


def test_nothing_is_struck_twice_at_once_and_a_quorum_is_left(load: Any) -> None:
    plan = load(
        "duration_s = 60",
        {"fault": "sigkill", "every": 5, "for_s": 3},
        {"fault": "freeze", "every": 6, "for_s": 3},
        {"fault": "broker-stop", "every": 10},
        {"fault": "sigstop", "target": "server", "every": 10},
    )
    for strike in plan.strikes:
        meanwhile = [other for other in plan.strikes if other is not strike and overlap(strike, other)]
        assert strike.target not in {other.target for other in meanwhile}
        if is_core(strike.target):
            assert not any(is_core(other.target) for other in meanwhile)
        at_once = {o.target for o in plan.strikes if o.at <= strike.at < o.at + o.for_s and not is_core(o.target)}
        assert len(at_once) <= 2


@pytest.mark.parametrize("every", [4, 3, 2.5])
def test_faults_strike_within_the_duration_however_dense(load: Any, every: float) -> None:
    plan = load("duration_s = 60", {"fault": "sigkill", "every": every, "for_s": 3}, {"fault": "reset", "at": 60})
    assert len(plan.strikes) == 60 // every + 1
    assert plan.strikes[-1].at <= 60


@pytest.mark.parametrize("every", [1, 1e-6])
def test_more_faults_than_fit_are_refused_at_once(load: Any, every: float) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match="do not fit into 600 s"):
        load("duration_s = 600", {"fault": "sigkill", "every": every})
    assert time.monotonic() - began < 5


def test_a_day_of_faults_is_drawn_in_seconds(load: Any) -> None:
    began = time.monotonic()
    assert len(load("duration_s = 86400", {"fault": "sigkill", "every": 10}).strikes) == 8640
    assert time.monotonic() - began < 10


# --- the federation ---


def test_a_toy_federation_has_rounds_that_last(load: Any) -> None:
    plan = load("duration_s = 100\n[federation]\nnodes = 6\npace_s = 0.1", KILL)
    assert plan.server is not None
    assert (plan.server.engine, plan.server.federation, plan.server.rounds.min_nodes) == ("toy", FEDERATION, 3)
    assert plan.server.rounds.count >= 100 / 0.4
    assert load("[federation.rounds]\ncount = 7", KILL).server.rounds.count == 7
    assert load('[federation.early_stopping]\nby = "vpcs"', KILL).server.early_stopping.by == "vpcs"


def test_a_federation_of_files(tmp_path: Path, load: Any) -> None:
    text = 'federation = "f"\nstate_dir = "s"\nengine = "toy"\nonce = true\nrounds.min_updates = 2\n'
    (tmp_path / "federation.toml").write_text(text)
    for node in ("a", "b"):
        (tmp_path / f"{node}.toml").write_text(
            f'id = "{node}"\nfederation = "f"\ndata = "rows.jsonl"\nstate_dir = "{node}"\nexit_when_finished = true\n'
        )
    plan = load('[federation]\nconfig = "federation.toml"\nnode_configs = ["a.toml", "b.toml"]', KILL)
    assert plan.server.federation == "f"
    assert plan.server.state_dir == tmp_path / "out/server"
    assert not plan.server.once
    assert list(plan.nodes) == ["a", "b"]
    assert plan.nodes["a"].data == tmp_path / "rows.jsonl"
    assert plan.nodes["a"].state_dir == tmp_path / "out/a"
    assert not plan.nodes["a"].exit_when_finished


def test_poison_is_for_nodes_that_send_projected_gradients(tmp_path: Path, load: Any) -> None:
    (tmp_path / "federation.toml").write_text(
        'federation = "f"\nstate_dir = "s"\nengine = "toy"\nvalues.accept = true\n'
    )
    for node, uplink in (("a", "path"), ("b", "values"), ("c", "path")):
        (tmp_path / f"{node}.toml").write_text(
            f'id = "{node}"\nfederation = "f"\ndata = "rows.jsonl"\nstate_dir = "{node}"\nuplink = "{uplink}"\n'
        )
    files = '[federation]\nconfig = "federation.toml"\nnode_configs = ["a.toml", "b.toml", "c.toml"]'
    assert load(files, {"fault": "poison", "target": "a", "at": 1}).strikes
    for target in ("b", "nodes"):
        with pytest.raises(ConfigError, match=r"faults\.0\.target: 'poison' changes projected gradients, and b sends"):
            load(files, {"fault": "poison", "target": target, "at": 1})


# --- errors ---

ATTACH = '[attach]\nfederation = "f"\nstate_dir = "s"\nbroker = { url = "mqtt://127.0.0.1:1883" }\n'


@pytest.mark.parametrize(
    ("text", "faults", "words"),
    [
        ("", [], ["faults", "is missing"]),
        ("faults = []", [], ["faults", "at least one item"]),
        ("sed = 1", [KILL], ["sed", "is unknown"]),
        ("duration_s = -1", [KILL], ["duration_s", "not -1"]),
        ("", [{"fault": "sigkil", "at": 1}], ["faults.0.fault", "'sigkil' is unknown", "sigkill"]),
        ("", [KILL, {"fault": "latency"}], ["faults.1", "at, or every, or between"]),
        ("", [KILL | {"every": 3}], ["faults.0", "at, or every, or between"]),
        ("", [{"fault": "reset", "between": [5, 4]}], ["faults.0", "the earlier first"]),
        ("", [KILL | {"at": []}], ["faults.0", "at must name a moment"]),
        ("", [KILL | {"at": -1}], ["faults.0.at.0", "greater than or equal to 0, not -1"]),
        ("duration_s = 60", [KILL | {"at": 5000}], ["faults.0.at names 5000 s", "after duration_s = 60"]),
        ("duration_s = 60", [{"fault": "reset", "between": [9, 99]}], ["faults.0.between", "after duration_s = 60"]),
        ("duration_s = 9", [KILL, *[KILL | {"target": "server"}] * 4], ["faults", "do not fit into 9 s"]),
        ("[federation]\nnodes = 3\nrounds.min_nodes = 4", [KILL], ["rounds.min_nodes", "is 4", "has 3 nodes"]),
        ("", [KILL | {"latency_s": 1}], ["faults.0", "latency_s", "is unknown"]),
        ("", [{"fault": "latency", "at": 1, "latency_s": -1}], ["faults.0", "latency_s", "not -1"]),
        ("", [{"fault": "drop", "at": 1, "packets": ["pubcomp"]}], ["faults.0", "packets.0", "not 'pubcomp'"]),
        ("", [KILL | {"target": "node-8"}], ["faults.0.target", "'node-8'", "sigkill"]),
        ("", [KILL | {"target": "broker"}], ["faults.0.target", "'broker'"]),
        ("", [{"fault": "reset", "target": "node-1", "at": 1}], ["faults.0.target", "link:nodes"]),
        ("[federation.rounds]\nquorum = 2", [KILL], ["federation.rounds", "quorum", "not 2"]),
        ("[federation.rounds]\nqorum = 2", [KILL], ["federation.rounds", "qorum", "is unknown"]),
        ('[federation]\nconfig = "none.toml"', [KILL], ["federation", "config and node_configs go together"]),
        ('[federation]\nconfig = "f.toml"\nnode_configs = ["none.toml"]', [KILL], ["none.toml", "cannot be read"]),
        (ATTACH, [KILL], ["attach.nodes", "is missing"]),
        (f"{ATTACH}nodes.a.pid = 7", [{"fault": "clone", "at": 1}], ["faults.0.fault", "what a drill started"]),
        (f"{ATTACH}nodes.a.pid = 7", [{"fault": "reset", "at": 1}], ["faults.0.target", "no proxy_port of a"]),
        (f"{ATTACH}nodes.a.proxy_port = 7", [KILL], ["faults.0.target", "no pid of a"]),
    ],
)  # fmt: skip
def test_a_wrong_plan_is_one_line(
    text: str, faults: list[dict[str, Any]], words: list[str], tmp_path: Path, load: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text, *faults)
    line = str(caught.value)
    assert "\n" not in line
    assert str(tmp_path) in line
    for word in words:
        assert word in line


def test_an_unknown_plan_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plan evrything: is neither.*everything.*flaky-wifi"):
        load_plan("evrything", out=tmp_path)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 4.9, float("nan"), float("inf"), 1e6])
def test_a_duration_that_is_none_is_one_line(load: Any, seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"--seconds .*: is no duration of a drill; give 5 to 604800"):
        load("", KILL, seconds=seconds)
