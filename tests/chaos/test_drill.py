"""Drills on real processes: a clean one, ones that must fail, one on a federation that runs already."""

import asyncio
import json
import math
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from meerkat_mq.chaos import judge
from meerkat_mq.chaos.drill import Drill
from meerkat_mq.chaos.faults import FAULTS, Fault
from meerkat_mq.chaos.faults.packets import Treatment
from meerkat_mq.chaos.observer import Observed
from meerkat_mq.chaos.plan import load_plan
from meerkat_mq.chaos.processes import Service
from meerkat_mq.chaos.proxy import Packet, Passage
from meerkat_mq.chaos.stage import Stage
from meerkat_mq.chaos.verdict import DrillResult, Struck, render
from meerkat_mq.errors import DrillFailed
from meerkat_mq.ledger.sqlite import LEDGER_FILE
from meerkat_mq.rounds.records import UpdateRecord, Verdict
from meerkat_mq.simulate.checkers import Violation
from meerkat_mq.wire.messages import Header, Update
from tests.server.federation import NAME, Federation
from tests.support.command import Meerkat
from tests.support.mosquitto import Mosquitto, free_port
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
async def federation(mosquitto: Mosquitto, tmp_path: Path) -> AsyncIterator[Federation]:
    async with Federation(tmp_path, mosquitto.config) as running:
        yield running


SMALL = """
duration_s = 4
recover_s = 10
return_s = 10

[federation]
nodes = 3
"""


SERVER = """
second-server 1.5
broker-kill 0.5
sigkill 0.5 target="server"
disk-full 1.5 target="server"
corrupt 0.5 target="link:server"
clock-step 0.5 target="server"
"""
SERVER_BUFFERED = """
broker-stop 0.5
auth-refused 1.5
host-power-cut 0.5 target="server"
certificate-swapped 1 target="link:server"
sigstop 1 target="server"
cut 0.5 target="link:server"
"""
NODES = """
sigkill 0.5
sigstop 1
clone 1
host-power-cut 1
disk-full 2
log-full 1.5
log-full 2 how="stalled"
clock-step 1
clock-step 1 by_s=7200
certificate-swapped 1.5
certificate-swapped 1.5 which="client"
certificate-swapped 1.5 which="ca"
latency 1
bandwidth 1
refuse 1
reset 0.2
freeze 1 way="up"
freeze 1 way="down"
cut 1
duplicate 1 share=0.5
reorder 1
drop 1 way="down"
corrupt 1
poison 1.5 how="nan"
poison 1.5 how="huge"
poison 1.5 how="flip"
"""


def struck(faults: str, first_s: float = 0, every_s: float = 0) -> list[str]:
    """Lines of a plan: one fault after the other; where no time is between them, each waits for those before it."""
    rows = [line.split() for line in faults.strip().splitlines()]
    return [
        key
        for number, (fault, for_s, *keys) in enumerate(rows)
        for key in ("[[faults]]", f'fault = "{fault}"', f"at = {first_s + every_s * number}", f"for_s = {for_s}", *keys)
    ]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("server", "flags", "pace_s"),
    [(SERVER, [], 0.1), (SERVER_BUFFERED, ["--buffered"], 0.2)],  # buffered rounds close more often
    ids=["synchronous", "buffered"],
)
def test_a_dense_drill_is_clean(meerkat: Meerkat, tmp_path: Path, server: str, flags: list[str], pace_s: float) -> None:
    """The shipped plans last longer: `make test-chaos` runs them."""
    assert {line.split()[0] for line in (SERVER + SERVER_BUFFERED + NODES).split("\n") if line} == FAULTS.keys()
    plan = ["duration_s = 20", "recover_s = 30", "[federation]", "nodes = 9", f"pace_s = {pace_s}"]
    (tmp_path / "dense.toml").write_text("\n".join([*plan, *struck(server, 1, 3.5), *struck(NODES)]))
    done = meerkat("chaos", tmp_path / "dense.toml", "--out", tmp_path / "out", "--json", *flags)
    assert done.code == 0, done.err
    verdict = json.loads(done.out)
    assert verdict["holds"]
    assert all(row["recovered"] == row["times"] > 0 for row in verdict["faults"])
    assert len(verdict["checks"]) > 10
    assert json.loads((tmp_path / "out/verdict.json").read_text()) == verdict
    assert "everything held" in done.err
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("band ") >= len(verdict["strikes"]) == 32
    assert len((tmp_path / "out/history.jsonl").read_text().splitlines()) > verdict["rounds"]


async def test_an_interrupted_drill_proves_nothing_and_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(f'{SMALL}[[faults]]\nfault = "sigstop"\nat = 0.5\nfor_s = 60\n')
    command = [sys.executable, "-m", "meerkat_mq", "chaos", str(tmp_path / "plan.toml"), "--out", str(tmp_path / "out")]
    drill = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert drill.stdout is not None
    while b"sigstop on" not in await asyncio.wait_for(drill.stdout.readline(), 60):
        pass
    children = psutil.Process(drill.pid).children(recursive=True)
    assert len(children) == 5
    drill.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(drill.communicate(), 60)
    assert (drill.returncode, b"was interrupted, so nothing is proven" in err) == (130, True)
    await until(lambda: not any(child.is_running() for child in children))


def test_a_folder_that_cannot_be_written_is_one_line(meerkat: Meerkat, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    meerkat("chaos", "everything", "--out", tmp_path / "file").failed(2, f"--out {tmp_path / 'file'}", "cannot be")
    meerkat("chaos", "nothing", "--out", tmp_path / "out").failed(2, "plan nothing", "flaky-wifi")
    meerkat("chaos", "everything", "--seconds", "inf").failed(2, "--seconds inf", "is no duration")


def test_an_earlier_drill_keeps_its_log(meerkat: Meerkat, tmp_path: Path) -> None:
    log = tmp_path / "drill.log"
    log.write_text("of an earlier drill")
    meerkat("chaos", "everything", "--out", tmp_path).failed(2, f"--out {tmp_path}", "holds an earlier drill")
    assert log.read_text() == "of an earlier drill"


def test_the_help_says_where_a_drill_leaves_its_files(meerkat: Meerkat) -> None:
    assert "runs/chaos" in meerkat("chaos", "--help").out


class Forge(Fault):
    """Somebody alters the ledger behind the server's back."""

    name = "forge"
    on = "server"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        with closing(sqlite3.connect(stage.state_dir / LEDGER_FILE, isolation_level=None)) as ledger:
            query = "SELECT slot, scalars FROM updates WHERE version = 1 AND verdict = 0"
            slot, scalars = ledger.execute(query).fetchone()
            turned = scalars[:3] + bytes([scalars[3] ^ 0x80])
            ledger.execute("UPDATE updates SET scalars = ? WHERE version = 1 AND slot = ?", (turned, slot))
        yield


def test_a_forged_ledger_fails_the_drill(meerkat: Meerkat, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(FAULTS, "forge", Forge)
    (tmp_path / "forged.toml").write_text(f'{SMALL}[[faults]]\nfault = "forge"\nat = 1\nfor_s = 1\n')
    done = meerkat("chaos", tmp_path / "forged.toml", "--out", tmp_path / "out")
    done.failed(6, "plan forged", ", the first: ", str(tmp_path / "out/verdict.json"))
    verdict = json.loads((tmp_path / "out/verdict.json").read_text())
    assert not verdict["holds"]
    broken = {name for name, found in verdict["checks"].items() if found}
    assert "coefficients recomputable" in broken
    assert "the ledger verifies" in broken
    assert "no committed round lost or changed" not in broken
    assert "✗ fails" in (tmp_path / "out/report.html").read_text()

    meerkat("chaos", tmp_path / "forged.toml", "--out", tmp_path / "out").failed(2, "holds an earlier drill")


class Broken(Treatment):
    """A fault with a bug."""

    name = "broken"

    def treat(self, packet: Packet, random: Random) -> Passage:
        raise KeyError(packet.kind)


async def test_a_fault_that_raises_fails_the_drill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(FAULTS, "broken", Broken)
    (tmp_path / "plan.toml").write_text(
        f'{SMALL}[[faults]]\nfault = "broken"\ntarget = "link:node-1"\nat = 1\nfor_s = 1\nshare = 1.0\n'
    )
    out = tmp_path / "out"
    verdict = await Drill(load_plan(str(tmp_path / "plan.toml"), out=out), out).run()
    (found,) = verdict.violations
    assert (found.checker, found.where) == ("faults strike and heal as planned", "broken on link:node-1")
    assert found.problem.startswith("raised KeyError: 3")
    assert verdict.strikes[0].problem == found.problem


async def test_a_drill_attaches_to_a_federation_that_runs(
    mosquitto: Mosquitto, federation: Federation, tmp_path: Path
) -> None:
    port = free_port()
    server = federation.server(rounds={"count": 1_000_000, "min_nodes": 2, "quorum": 0.5, "deadline_s": 0.5})
    first = federation.node("node-0")
    federation.node("node-1", broker={"url": f"mqtt://127.0.0.1:{port}"})  # the drill's proxy, not there yet
    (tmp_path / "plan.toml").write_text(f"""
        duration_s = 4
        [attach]
        federation = "{NAME}"
        state_dir = "{tmp_path / "server"}"
        broker.url = "{mosquitto.url}"
        server.pid = {server.pid}
        nodes.node-0.pid = {first.pid}
        nodes.node-1.proxy_port = {port}
        [[faults]]
        fault = "sigstop"
        target = "node-0"
        at = 0.5
        for_s = 1
        [[faults]]
        fault = "duplicate"
        target = "link:node-1"
        share = 1.0
        at = 0.5
        for_s = 2
        [[faults]]
        fault = "sigstop"
        target = "server"
        at = 3
        for_s = 0.5
    """)
    out = tmp_path / "out"
    verdict = await Drill(load_plan(str(tmp_path / "plan.toml"), out=out), out).run()
    assert verdict.violations == []
    assert [(struck.fault, struck.target) for struck in verdict.strikes] == [
        ("sigstop", "node-0"),
        ("duplicate", "link:node-1"),
        ("sigstop", "server"),
    ]
    assert not server.over
    assert not first.over


async def test_a_service_is_started_again_and_its_death_is_remembered(tmp_path: Path) -> None:
    service = Service("node-0", "node", tmp_path / "none.toml", tmp_path / "node-0.log")
    await service.start()
    await until(lambda: len(service.deaths) >= 2, within_s=30)
    await service.kill()
    end = service.deaths[0]
    assert (end.name, end.code) == ("node-0", 2)
    assert "none.toml" in end.words
    assert service.tracebacks() == 0
    deaths = len(service.deaths)
    await service.start()
    service.expect_end()
    await service.ends_in_words(2, within_s=30)
    assert len(service.deaths) == deaths
    await service.start()
    service.expect_end()
    with pytest.raises(DrillFailed, match="ended with code 2"):
        await service.ends_in_words(6, within_s=30)


# --- what a drill judges by itself ---


def seen(**closed: float) -> Observed:
    return Observed(closed={int(version[1:]): time for version, time in closed.items()})


def test_recovery_is_counted_from_the_last_healing_that_matters() -> None:
    rounds = seen(v1=1.0, v2=4.5, v3=9.0)
    node = Struck("sigkill", "node-0", 2.0, 4.0)
    assert judge.recovery_s(node, [node], rounds) == 0.5
    for target in ("broker", "server", "link:server"):
        core = Struck("broker-kill", target, 3.5, 8.0)
        assert judge.recovery_s(node, [node, core], rounds) == 1.0
    other = Struck("sigkill", "node-1", 3.5, 8.0)
    assert judge.recovery_s(node, [node, other], rounds) == 0.5
    assert judge.recovery_s(Struck("reset", "node-0", 9.0, 10.0), [], rounds) is None


def struck_once(recovery_s: float | None) -> Struck:
    return Struck("sigkill", "node-0", 1.0, 2.0, recovery_s)


def test_a_round_that_closes_late_or_never_is_a_violation() -> None:
    plan: Any = SimpleNamespace(file=SimpleNamespace(recover_s=5.0))
    found = list(judge.recovers(plan, [struck_once(4.0), struck_once(6.0), struck_once(None)]))
    assert found == [
        ("sigkill on node-0", "the next round closed 6.0 s after it had healed"),
        ("sigkill on node-0", "no round closed after it had healed at 2.0 s"),
    ]


def test_deaths_and_tracebacks_are_violations(tmp_path: Path) -> None:
    log = tmp_path / "node-0.log"
    service = Service("node-0", "node", tmp_path / "node-0.toml", log)
    stage: Any = SimpleNamespace(everybody=[service])
    log.write_text('{"event": "ready"}\n')
    assert list(judge.ends_in_words(stage)) == []
    log.write_text("Traceback (most recent call last):\n")
    assert list(judge.ends_in_words(stage)) == [("node-0", "its log holds 1 tracebacks")]


def made_up(**changes: Any) -> DrillResult:
    table: dict[str, Any] = {
        "plan": "<plan>",
        "seed": 1,
        "nodes": 3,
        "seconds": 20.0,
        "rounds": 2,
        "closed": [(1.0, 1), (4.0, 2)],
        "dropped": 0,
        "strikes": [struck_once(1.0), struck_once(3.0), struck_once(None)],
        "checks": {"one": [], "two": [Violation("two", "node-<1>", "differs")]},
    }
    return DrillResult(**(table | changes))


def test_a_verdict_counts_by_fault() -> None:
    (row,) = made_up().faults
    assert (row.times, row.recovered, row.median_s, row.longest_s) == (3, 2, 2.0, 3.0)
    assert not made_up().holds
    assert made_up(checks={"one": []}).holds
    assert not math.isnan(json.loads(made_up().to_json())["seconds"])


def test_the_page_shows_all_of_it_and_escapes() -> None:
    page = render(made_up())
    assert "<plan>" not in page
    assert "node-&lt;1&gt;" in page
    assert page.count('class="band') == 3
    assert "no round after 1 of them" in page


GOOD, NAN, HUGE = (0.5,), (math.nan,), (1e9,)


@pytest.mark.parametrize(
    ("how", "sent", "verdicts", "violations"),
    [
        ("nan", [GOOD, NAN, NAN], [0, 1, 1], 0),
        ("nan", [GOOD, NAN, NAN], [0, 0, 0], 1),
        ("huge", [GOOD, HUGE], [0, 2], 0),
        ("huge", [HUGE], [0], 1),
        ("nan", [GOOD], [0], 1),  # only what came before the poison
        ("flip", [], [], 1),
        ("flip", [GOOD] * 25, [0] * 19 + [4] + [0] * 5, 0),
        ("flip", [GOOD] * 25, [0] * 20 + [4] * 5, 1),
        ("flip", [GOOD] * 19, [0] * 19, 0),  # too few to tell
    ],
)
def test_poison_must_be_refused_within_twenty_rounds(
    how: str, sent: list[tuple[float, ...]], verdicts: list[int], violations: int
) -> None:
    fault = FAULTS["poison"].model_validate({"how": how})
    strike: Any = SimpleNamespace(fault=fault, target="node-0")
    updates = [
        (1.0, "node-0", Update(Header(1, 1, version, bytes(8)), 7, bytes(8), 0.5, scalars))
        for version, scalars in enumerate(sent)
    ]
    history: Any = SimpleNamespace(
        records=[
            (UpdateRecord(version, "node-0", 0, 7, 1, scalars, 0.5, Verdict(verdict)),)
            for version, (scalars, verdict) in enumerate(zip(sent, verdicts, strict=True))
        ]
    )
    found = list(judge.refused([(strike, struck_once(1.0))], Observed(updates=updates), history, 5.0))
    assert len(found) == violations


@pytest.mark.parametrize(
    ("target", "began", "problem", "violations"),
    [
        ("server", 1.5, "", 0),  # it was down meanwhile
        ("node-0", -4.0, "", 0),  # it was on its way back
        ("node-0", -9.0, "", 1),
        ("node-1", 1.5, "", 1),
        ("node-1", 1.5, "raised KeyError: 3", 0),  # a violation already
    ],
)
def test_poison_that_never_came_needs_an_excuse(target: str, began: float, problem: str, violations: int) -> None:
    poison: Any = SimpleNamespace(fault=FAULTS["poison"](), target="node-0")
    other: Any = SimpleNamespace(fault=FAULTS["sigkill"](), target=target)
    happened = [
        (poison, Struck("poison", "node-0", 1.0, 2.0, 1.0, problem)),
        (other, Struck("sigkill", target, began, began + 1.0, 1.0)),
    ]
    history: Any = SimpleNamespace(records=[])
    found = list(judge.refused(happened, Observed(), history, 5.0))
    assert len(found) == violations
    assert all("no poisoned update" in problem for _, problem in found)
