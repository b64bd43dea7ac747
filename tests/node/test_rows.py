"""New data files are picked up between rounds."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from meerkat_mq.core.step import Row
from meerkat_mq.engines.toy import read_seeds
from meerkat_mq.errors import DataError
from meerkat_mq.node.work import LocalRows
from meerkat_mq.tasks.data import read_rows, usable_rows
from meerkat_mq.tasks.load import load_task
from tests.node.mini_server import MiniServer, node
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import until


def local(data: Path, task: str | None = None) -> LocalRows:
    return LocalRows(data, read_seeds if task is None else partial(read_rows, task=load_task(task)))


def refreshed(rows: LocalRows) -> int:
    rows.refresh()
    return len(rows.rows)


def test_files_that_come_go_and_change_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "b.jsonl").write_text('{"seed": 2}\n')
    (folder / "notes.txt").write_text("no rows")
    rows = local(folder)
    assert refreshed(rows) == 1
    (folder / "a.jsonl").write_text('{"seed": 1}\n')
    assert refreshed(rows) == 2
    assert [row["seed"] for row in rows.rows] == [1, 2]
    (folder / "b.jsonl").write_text('{"seed": 2}\n{"seed": 3}\n')
    assert refreshed(rows) == 3
    (folder / "a.jsonl").unlink()
    assert refreshed(rows) == 2


def test_rows_of_a_task_come_of_all_kinds_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.csv").write_text("sentence,label\nbad,0\n")
    rows = local(folder, "sst2")
    (folder / "b.jsonl").write_text('{"sentence": "good", "label": 1}\n')
    assert refreshed(rows) == 2
    assert [row["label"] for row in rows.rows] == [0, 1]


def test_a_long_text_in_windows_is_no_row_left_out(tmp_path: Path) -> None:
    file, task = tmp_path / "rows.jsonl", tmp_path / "t.toml"
    task.write_text('kind = "text"\n')
    file.write_text('{"text": "one two three"}\n{"text": "four"}\n{"text": "bad"}\n')
    rows, found = local(file, str(task)), load_task(task)

    def usable(given: Sequence[Row]) -> list[Row]:
        parts = [part for row in given for part in found.windows(row, str.split)]
        return [part for part in parts if part["text"] != "bad"]

    rows.check(usable)
    assert [row["text"] for row in rows.rows] == ["one", "two", "three", "four"]
    assert rows.left_out == 1


def test_a_broken_file_is_a_warning_and_the_rows_stay_until_it_is_mended(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"seed": 1}\n')
    rows = local(file)
    with capture_logs() as logs:
        file.write_text('{"seed": 1}\n{"se')
        assert [refreshed(rows), refreshed(rows)] == [1, 1]
        file.unlink()
        assert [refreshed(rows), refreshed(rows)] == [1, 1]
    warnings = [line for line in logs if line["log_level"] == "warning"]
    assert [str(file) in line["problem"] for line in warnings] == [True, True]
    assert "rows.jsonl:2: is not JSON" in warnings[0]["problem"]
    file.write_text('{"seed": 1}\n' * 4)
    assert refreshed(rows) == 4


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data: .*: holds no rows"):
        local(tmp_path)


async def test_a_node_says_how_many_rows_it_has_now(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"seed": 1}\n')
    async with MiniServer(mosquitto.config) as server, node(tmp_path, mosquitto.config, data=folder):
        server.announce()
        await server.update()
        assert server.statuses[-1].rows == 1
        (folder / "b.jsonl").write_text('{"seed": 2}\n{"seed": 3}\n')
        server.close()
        server.announce()
        await until(lambda: server.updates[-1].header.version == 1)
        server.announce_server()
        await until(lambda: server.statuses[-1].rows == 3)


def usable(rows: Sequence[Row]) -> list[Row]:
    """As an engine whose tokenizer takes no odd seeds."""

    def prepare(part: Sequence[Row]) -> None:
        assert all(row["seed"] % 2 == 0 for row in part), "odd"

    return usable_rows(rows, prepare)


def test_a_node_works_without_the_rows_that_cannot_be_prepared(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"seed": 1}\n{"seed": 2}\n')
    rows = local(file)
    with capture_logs() as logs:
        rows.check(usable)
        assert ([row["seed"] for row in rows.rows], rows.left_out) == ([2], 1)
        file.write_text('{"seed": 4}\n{"seed": 6}\n{"seed": 7}\n')
        assert (refreshed(rows), rows.left_out) == (2, 1)
        file.write_text('{"seed": 9}\n')
        assert refreshed(rows) == 2
    assert [line["row"][-12:] for line in logs if "row" in line] == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:1"]
    assert "rows.jsonl:1: cannot be prepared (AssertionError: odd" in logs[-1]["problem"]


def test_a_node_whose_rows_all_fail_says_so(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"seed": 1}\n{"seed": 3}\n')
    rows = local(file)
    with pytest.raises(DataError, match=r"^data: .*rows\.jsonl:1: cannot be prepared .*, nor can any other of 2 rows"):
        rows.check(usable)
