"""`meerkat report`: the page of any run, from its state_dir alone, also while a server writes."""

import json
import math
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.errors import ConfigError
from meerkat_mq.ledger.inspect import run_shown
from meerkat_mq.observe.report import FACTS_FILE, Facts, NodeFacts, Standing
from meerkat_mq.rounds.records import Verdict
from meerkat_mq.server.alive import alive
from meerkat_mq.server.reporting import read_report
from tests.ledger.ledgers import RUN, Writer, alter, close_all, write
from tests.server.federation import Federation, all_end
from tests.support.command import Meerkat


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


def here(folder: Path) -> None:
    """The server's host is this one."""
    alter(folder, "UPDATE terms SET host = ?", socket.gethostname())


def test_a_run_between_two_rounds(tmp_path: Path) -> None:
    writer = Writer(tmp_path, absent={(1, 2)}, refused={(2, 1): Verdict.OUTLIER}, digest_every=2)
    for _ in range(3):
        writer.round()
    writer.see(0, "online", 5.0)
    writer.ledger.commit_metrics(0, {"accuracy": 0.5, "loss": 0.7})
    writer.ledger.commit_metrics(2, {"accuracy": 0.75, "loss": 0.6, "majority": 0.25, "rows": 40.0})
    writer.hear()
    report = read_report(tmp_path)
    assert (report.closed, report.descriptor.count, report.standing) == (3, 6, Standing.UNKNOWN)
    assert [number for number, _ in report.losses] == [0, 1, 2]
    assert report.losses[2][1] == pytest.approx(sum(writer.records(2)[slot].loss for slot in (0, 2)) / 2)
    assert [(e.version, e.accuracy, e.figures.get("majority"), e.rows) for e in report.evaluations] == [
        (0, 0.5, None, 0),
        (2, 0.75, 0.25, 40),
    ]
    assert report.gained == 0.25
    assert {name: node.updates for name, node in report.nodes.items()} == {"n0": 3, "n1": 3, "n2": 2}
    assert {name: node.proven for name, node in report.nodes.items()} == {"n0": 2, "n1": 2, "n2": 2}
    first = report.nodes["n0"]
    assert (first.rows, first.sent_bytes, first.received_bytes, first.labels) == (50, 264, None, ())
    assert report.counts == {"refused: outlier": 1, "closed at the deadline": 1}
    assert report.digest == writer.entries[1].digest.hex()  # that of version 2
    assert (report.parameters, report.bound, report.covered, report.warning) == (None, None, None, "")


def test_how_it_stands(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.round()
    here(tmp_path)
    assert read_report(tmp_path).standing is Standing.INTERRUPTED
    with alive(tmp_path):
        assert read_report(tmp_path).standing is Standing.RUNNING
    for _ in range(5):
        writer.round()
    assert read_report(tmp_path).standing is Standing.FINISHED


def test_before_the_first_round(tmp_path: Path) -> None:
    Writer(tmp_path)
    report = read_report(tmp_path)
    assert (report.closed, report.losses, report.seconds, report.digest) == (0, [], None, "")
    assert [node.proven for node in report.nodes.values()] == [None] * 3


def test_gradip_is_of_several_local_steps_only(tmp_path: Path) -> None:
    assert read_report(write(tmp_path / "one").folder).magnitudes == {}
    stopping = EarlyStoppingConfig(by="random", calibration_steps=6)
    report = read_report(write(tmp_path / "three", steps=3, early_stopping=stopping).folder)
    assert set(report.magnitudes) == {"n0", "n1", "n2"}
    assert set(report.judgements) == {"n0", "n1", "n2"}


def test_pauses_between_servers_do_not_count(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    for _ in range(4):
        writer.round()
    alter(tmp_path, "UPDATE terms SET taken = 100")
    writer.ledger.take_term(1, "6" * 16, "here")
    alter(tmp_path, "UPDATE terms SET taken = 5000 WHERE term = 2")
    for version, term, at in (
        (0, 1, 101.0),
        (1, 1, 103.0),
        (2, 2, 5004.0),
        (3, 2, 1.0),
    ):  # at last the clock is set back
        alter(tmp_path, "UPDATE entries SET term = ?, closed = ? WHERE version = ?", term, at, version)
    report = read_report(tmp_path)
    assert report.seconds == 1 + 2 + 4
    assert report.counts["server started"] == 2


def test_facts_are_added_where_they_are_of_this_run(tmp_path: Path) -> None:
    writer = write(tmp_path)
    newest = writer.entries[-1].digest.hex()
    nodes = {"n0": NodeFacts(labels=(3, 4), received_bytes=99, digest=newest), "nobody": NodeFacts()}
    facts = Facts(
        mask=writer.mask.hash.hex(), run=RUN.hex(), model="mine", parameters=1000, bound=0.9,
        nodes=nodes, counts={"late": 3},
    )  # fmt: skip
    facts.save(tmp_path)
    report = read_report(tmp_path)
    assert (report.model, report.parameters, report.bound, report.counts) == ("mine", 1000, 0.9, {"late": 3})
    assert (report.ended, report.astray, sorted(report.nodes)) == (["n0"], [], ["n0", "n1", "n2"])
    assert report.nodes["n0"].rows == 7
    for another in (replace(facts, run="0" * 32), replace(facts, mask="0" * 32)):
        another.save(tmp_path)
        assert read_report(tmp_path).parameters is None


def test_facts_of_an_earlier_release_are_read(tmp_path: Path) -> None:
    """They had the names of the classes, and the digest, which the ledger has too."""
    writer = write(tmp_path)
    node = {"labels": [3, 4], "digest": "ab" * 16, "peak_rss_mib": 312.4, "received_bytes": None}
    known = {"model": "mine", "classes": ["a", "b"], "digest": "ab" * 16, "seconds": 1.5, "nodes": {"n0": node}}
    facts = {"mask": writer.mask.hash.hex(), "run": RUN.hex(), **known}
    (tmp_path / FACTS_FILE).write_text(json.dumps(facts))
    report = read_report(tmp_path)
    assert (report.model, report.seconds, report.nodes["n0"].peak_rss_mib) == ("mine", 1.5, 312.4)
    assert report.digest == writer.entries[-1].digest.hex()


@pytest.mark.parametrize("text", ["{", "[]", '{"parameters": -1}', '{"nodes": {"a": 1}}', "\xff", '{"bound": NaN}'])
def test_facts_that_cannot_be_read_are_named(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / FACTS_FILE).write_text(text)
    with pytest.raises(ConfigError, match=FACTS_FILE):
        read_report(tmp_path)


def test_a_loss_that_rises_is_said_by_report_and_status(tmp_path: Path) -> None:
    writer = Writer(tmp_path, count=12)
    for _ in range(12):
        writer.round()
    assert read_report(tmp_path).warning == ""
    alter(tmp_path, "UPDATE updates SET loss = 9.0 WHERE version > 3")
    assert "the loss rises: 9 in round 11" in read_report(tmp_path).warning
    shown = run_shown(writer.ledger)
    assert shown.warning.endswith("lower rounds.lr")
    alter(tmp_path, "UPDATE updates SET loss = 1.0")
    writer.ledger.commit_metrics(0, {"loss": 0.5})
    writer.ledger.commit_metrics(8, {"loss": 0.7})
    assert "held-out loss rises: 0.7 after 8 rounds, 0.5 before" in run_shown(writer.ledger).warning


# --- the command ---


def test_the_command_writes_a_page_and_says_where(meerkat: Meerkat, tmp_path: Path) -> None:
    write(tmp_path / "state")
    said = meerkat("report", tmp_path / "state")
    assert said.out == f"Report: {tmp_path}/state/report.html (finished, 6 of 6 rounds)\n"
    page = (tmp_path / "state" / "report.html").read_text()
    assert "Fine-tuned by 3 nodes over MQTT" in page
    assert not [word for word in ("nan", "None", "null") if f">{word}<" in page]
    other = tmp_path / "page.html"
    assert str(other) in meerkat("report", tmp_path / "state", "--out", other).out
    assert other.exists()


def test_the_command_in_words(meerkat: Meerkat, tmp_path: Path) -> None:
    meerkat("report", tmp_path / "none").failed(6, "there is no ledger; give the state_dir of a server")
    write(tmp_path / "state")
    meerkat("report", tmp_path / "state", "--out", tmp_path / "missing" / "x.html").failed(2, "name another file")
    (tmp_path / "state" / FACTS_FILE).write_text("{")
    meerkat("report", tmp_path / "state").failed(2, FACTS_FILE, "remove it")


async def test_a_running_and_an_interrupted_run_have_a_page(
    federation: Federation, meerkat: Meerkat, tmp_path: Path
) -> None:
    node = federation.node("n0")
    server = federation.server(rounds={"count": 1_000_000, "deadline_s": 20})
    await server.says("round closed", times=5)
    assert "(running, " in meerkat("report", tmp_path / "server").out
    server.kill()
    said = meerkat("report", tmp_path / "server", "--out", tmp_path / "page.html")
    assert "(interrupted, " in said.out
    assert "Interrupted: " in (tmp_path / "page.html").read_text()
    node.stop()
    assert await all_end(node) == [0]


def test_a_long_run_is_read_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meerkat_mq.server.reporting.PAGE", 4)
    told: list[tuple[int, int]] = []
    report = read_report(write(tmp_path, count=10).folder, lambda done, total: told.append((done, total)))
    assert told == [(number, 10) for number in range(1, 11)]
    assert not any(math.isnan(loss) for _, loss in report.losses)
