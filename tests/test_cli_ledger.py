"""`meerkat status`, `ledger` and `verify` on ledgers that no server holds open, or one does."""

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from meerkat_mq.core.metrics import METRICS
from meerkat_mq.ledger.sqlite import LEDGER_FILE
from meerkat_mq.rounds.records import Verdict
from meerkat_mq.server import commands
from tests.ledger.ledgers import RUN, Writer, alter, close_all, write
from tests.support.command import Meerkat


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    """A server in the middle of a run: three of six rounds closed, one update refused."""
    made = Writer(tmp_path / "state", refused={(2, 1): Verdict.NOT_FINITE})
    for _ in range(3):
        made.round()
    made.see(0, "online", time.time())
    return made


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


def objects(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def words(line: str) -> list[str]:
    return line.split()


def test_help_names_the_commands(meerkat: Meerkat) -> None:
    out = meerkat("--help").out
    assert all(f" {name} " in out for name in ("status", "ledger", "verify"))


# --- status ---


def test_status(meerkat: Meerkat, writer: Writer) -> None:
    writer.hear()
    said = meerkat("status", writer.folder)
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert words(lines[0])[:3] == ["accuracy", "not", "measured:"]
    assert words(lines[1])[0] == "loss"
    assert "3 of 6 closed; round 3 is open, 3 acknowledged" in lines[2]
    assert "term 1 on here" in lines[4]
    assert f"{RUN.hex()} of federation f" in lines[5]
    assert words(lines[7]) == [
        "node",
        "slot",
        "status",
        "seen",
        "rows",
        "updates",
        "bytes",
        "behind",
        "verdict",
        "GradIP",
    ]
    assert words(lines[8])[:3] == ["n0", "0", "online"]
    assert words(lines[8])[-8:-1] == ["ago", "50", "3", "264", "B", "0", "accepted"]
    measured = [abs(writer.records(version)[0].scalars[0] * writer.products(version)[0][0]) for version in range(3)]
    assert words(lines[8])[-1] == f"{sum(measured) / 3:.5g}"
    assert words(lines[9])[:3] == ["n1", "1", "never"]
    assert " ".join(words(lines[-1])).startswith("refused: not finite: ")
    assert lines[-1].endswith(METRICS["refused: not finite"])


def test_status_as_json(meerkat: Meerkat, writer: Writer) -> None:
    (shown,) = objects(meerkat("status", writer.folder, "--json").out)
    assert (shown["round"], shown["rounds"], shown["run"]) == (3, 6, RUN.hex())
    assert [node["verdict"] for node in shown["nodes"]] == ["accepted", "not finite", "accepted"]


def write_on(monkeypatch: pytest.MonkeyPatch, writer: Writer) -> None:
    """A round closes whenever the command waits."""

    def wait(seconds: float) -> None:
        assert seconds == 1.0
        writer.round()

    monkeypatch.setattr("meerkat_mq.server.commands.time.sleep", wait)


def test_status_watches_until_the_run_is_finished(
    meerkat: Meerkat, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_on(monkeypatch, writer)
    lines = meerkat("status", writer.folder, "--watch").out.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"{closed} of 6 rounds" for closed in (3, 4, 5, 6)]
    assert all("1 of 3 nodes online" in line for line in lines)


def test_status_watches_as_json(meerkat: Meerkat, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    write_on(monkeypatch, writer)
    assert [line["round"] for line in objects(meerkat("status", writer.folder, "--json", "--watch").out)] == [
        3, 4, 5, 6,
    ]  # fmt: skip


def test_status_watches_on_a_terminal(meerkat: Meerkat, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    write_on(monkeypatch, writer)
    monkeypatch.setattr(commands, "Console", lambda **_: Console(force_terminal=True, width=120))
    out = meerkat("status", writer.folder, "--watch").out
    assert all(f"{closed} of 6 closed" in out for closed in (3, 4, 5))
    assert "all 6 closed: finished" in out


def test_ctrl_c_ends_watching_in_order(meerkat: Meerkat, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("meerkat_mq.server.commands.time.sleep", interrupt)
    said = meerkat("status", writer.folder, "--watch")
    assert (said.code, len(said.out.splitlines())) == (0, 1)


# --- ledger ---


def test_ledger_lists_rounds(meerkat: Meerkat, writer: Writer) -> None:
    lines = meerkat("ledger", writer.folder).out.splitlines()
    assert words(lines[0])[:2] == ["round", "term"]
    assert [words(line)[0] for line in lines[1:]] == ["0", "1", "2"]
    assert [words(line)[4:7] for line in lines[1:]] == [["3", "3", "0"], ["3", "3", "0"], ["3", "2", "1"]]
    assert words(lines[3])[-1] == writer.entries[2].digest.hex()[:8]


@pytest.mark.parametrize(
    ("options", "versions"),
    [
        (("--last", 2), [1, 2]),
        (("--from", 1), [1, 2]),
        (("--from", 0, "--count", 2), [0, 1]),
        (("--from", 9), []),
        (("--round", 1), [1]),
        (("--node", "n1", "--last", 1), [2]),
        (("--node", "n1", "--from", 0, "--count", 2), [0, 1]),
        (("--gradip", "--from", 1), [1, 1, 1, 2, 2]),
        (("--gradip", "--node", "n1", "--last", 2), [1]),
        (("--gradip", "--round", 0), [0, 0, 0]),
        (("--rebuild", "--node", "n2", "--round", 2), [2]),
    ],
)
def test_ledger_as_json(
    meerkat: Meerkat, writer: Writer, options: tuple[object, ...], versions: list[int]
) -> None:  # fmt: skip
    assert [line["round"] for line in objects(meerkat("ledger", writer.folder, *options, "--json").out)] == versions


def test_a_round_whole_as_json(meerkat: Meerkat, writer: Writer) -> None:
    (shown,) = objects(meerkat("ledger", writer.folder, "--round", 2, "--json").out)
    entry = writer.entries[2]
    assert shown["hash"] == entry.hash(RUN).hex()
    assert [term["coefficient"] for term in shown["terms"]] == [term.coefficient for term in entry.terms]
    assert [update["scalars"] for update in shown["updates"]][1] == [None]  # NaN is no JSON
    assert [update["verdict"] for update in shown["updates"]] == ["accepted", "not finite", "accepted"]


def test_a_round_whole(meerkat: Meerkat, writer: Writer) -> None:
    out = meerkat("ledger", writer.folder, "--round", 2).out
    entry = writer.entries[2]
    for expected in (entry.digest.hex(), entry.previous.hex(), entry.hash(RUN).hex(), "not finite", "nan"):
        assert expected in out
    assert f"{entry.terms[0].coefficient:.9g}" in out
    assert f"{writer.records(2)[0].scalars[0]:.9g}" in out


def test_the_path_of_a_node(meerkat: Meerkat, writer: Writer) -> None:
    lines = meerkat("ledger", writer.folder, "--node", "n1").out.splitlines()
    assert [words(line)[0] for line in lines[1:]] == ["0", "1", "2"]
    assert f"{writer.records(0)[1].scalars[0]:.9g}" in words(lines[1])


# --- virtual paths ---


def test_gradip_in_pages(meerkat: Meerkat, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = meerkat("ledger", writer.folder, "--gradip").out
    monkeypatch.setattr(commands, "STEPS_A_PAGE", 3)
    assert meerkat("ledger", writer.folder, "--gradip").out == whole
    head, *lines = map(words, whole.splitlines())
    assert head == ["round", "node", "lane", "step", "seed", "g", "GradIP"]
    assert [line[:2] for line in lines] == [
        *(["0", f"n{slot}"] for slot in range(3)),
        *(["1", f"n{slot}"] for slot in range(3)),
        *(["2", f"n{slot}"] for slot in (0, 2)),  # the other update was refused
    ]
    g = writer.records(1)[2].scalars[0]
    assert lines[5][-2:] == [f"{g:.9g}", f"{g * writer.products(1)[0][0]:.9g}"]


def test_a_path_rebuilt(meerkat: Meerkat, writer: Writer) -> None:
    head, line = map(
        words, meerkat("ledger", writer.folder, "--rebuild", "--node", "n2", "--round", 2).out.splitlines()
    )
    assert head[-1] == "distance"
    assert float(line[-1]) > 0


# --- verify ---


def test_verify_says_one_line(meerkat: Meerkat, tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    for _ in range(6):
        writer.round()
    writer.snapshot()
    writer.difference()
    said = meerkat("verify", tmp_path)
    assert (said.code, said.err) == (0, "")
    (line,) = said.out.splitlines()
    assert line.startswith(f"{tmp_path}: 6 rounds and 18 updates are as they must be; snapshot-6.mks, difference")
    assert f"digest {writer.entries[-1].digest.hex()}, " in line


def test_verify_says_what_is_wrong(meerkat: Meerkat, tmp_path: Path) -> None:
    write(tmp_path)
    alter(tmp_path, "UPDATE updates SET scalars = zeroblob(4) WHERE version = 4 AND slot = 0")
    said = meerkat("verify", tmp_path)
    said.failed(6, "entry 4: its term 0 is lane 0, step 0, coefficient ", "; its updates give lane 0, step 0, coef")
    assert said.out == ""


def test_a_wrong_command_line(meerkat: Meerkat, writer: Writer, tmp_path: Path) -> None:
    def fails(code: int, *arguments: object, says: str) -> None:
        meerkat(*arguments).failed(code, says)

    fails(2, "verify", writer.folder, "--model", tmp_path, says="--model, --base: only one of them was given")
    fails(4, "verify", writer.folder, "--mask", tmp_path / "none.mkm", says="none.mkm: is missing")
    fails(2, "ledger", writer.folder, "--round", 1, "--node", "n1", says="--node: is for many rounds, --round for one")
    for half in (("--round", 1), ("--node", "n1")):
        fails(2, "ledger", writer.folder, "--rebuild", *half, says="--rebuild: is for one node in one round; give --r")
    fails(
        6, "ledger", writer.folder, "--rebuild", "--round", 3, "--node", "n1", says="round 3: did not close; 3 rounds"
    )
    fails(
        6, "ledger", writer.folder, "--rebuild", "--round", 2, "--node", "n9", says="node n9: gave nothing from theta"
    )
    fails(6, "ledger", writer.folder, "--gradip", "--node", "n9", says="node n9: is not in the ledger; it knows n0, n1")
    fails(6, "ledger", writer.folder, "--round", 3, says="round 3: did not close; 3 rounds have; name an earlier one")
    fails(6, "ledger", writer.folder, "--node", "n9", says="node n9: is not in the ledger; it knows n0, n1, n2")
    assert meerkat("ledger", writer.folder, "--last", 0).code == 2
    for option in ("--round", "--from"):
        said = meerkat("ledger", writer.folder, option, "9" * 23)
        assert (said.code, "Traceback" in said.err) == (2, False)
        assert option in said.err


@pytest.mark.parametrize("name", ["status", "verify"])
@pytest.mark.parametrize(
    "statement", ["UPDATE run SET descriptor = '{}'", "UPDATE run SET rules = 'zz'", "UPDATE run SET rules = '{}'"]
)
def test_a_ledger_whose_run_is_damaged(meerkat: Meerkat, tmp_path: Path, name: str, statement: str) -> None:
    write(tmp_path)
    alter(tmp_path, statement)
    meerkat(name, tmp_path).failed(6, f"{tmp_path / LEDGER_FILE}: holds ", "restore it from a backup")


@pytest.mark.parametrize("name", ["status", "ledger", "verify"])
def test_no_ledger(meerkat: Meerkat, tmp_path: Path, name: str) -> None:
    meerkat(name, tmp_path / "none").failed(6, "there is no ledger; give the state_dir of a server that was started")
    write(tmp_path / "demo" / "server")
    meerkat(name, tmp_path / "demo").failed(6, f"there is no ledger; give {tmp_path / 'demo' / 'server'}")
    write(tmp_path / "newer")
    alter_schema(tmp_path / "newer", 99)
    meerkat(name, tmp_path / "newer").failed(6, "was written by a newer Meerkat-MQ (schema 99")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / LEDGER_FILE).write_bytes(bytes(4096))
    meerkat(name, tmp_path / "foreign").failed(6, "is not a SQLite file")
    meerkat(name, tmp_path / "foreign" / LEDGER_FILE).failed(6, "there is no ledger")


def alter_schema(folder: Path, version: int) -> None:
    with closing(sqlite3.connect(folder / LEDGER_FILE)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
