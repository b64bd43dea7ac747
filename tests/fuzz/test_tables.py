"""Damaged task, data and configuration files: read, or refused in one line; never a traceback, never another file."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from meerkat_mq.config import NodeConfig, ServerConfig, load_config
from meerkat_mq.sweep.plan import SweepPlan
from meerkat_mq.tasks.classification import TASKS, Classification
from meerkat_mq.tasks.data import partition, read_rows, read_texts, write_rows
from meerkat_mq.tasks.load import load_task, task_of
from meerkat_mq.tasks.template import fill
from meerkat_mq.wire.descriptor import TaskDescription
from tests.fuzz.mutate import COUNT, mutants
from tests.fuzz.refusals import read_or_refused

AGNEWS = TASKS["agnews"]
ROWS = [
    {"id": number, "text": f'number {number}, \u00e9 "x"', "label": number % 4, "more": [1.5, None]}
    for number in range(6)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = 'id,text,label\n1,"one, \u00e9",1\n2,two\u2028,0\n3,"a ""b""\nc",3\n'.encode()
TASK = b"""
name = "tickets"
fields = ["subject", "body"]
template = "{subject}: {body}\\nThis is about"
label_words = [" billing", " delivery", " returns"]
text = "{body} {subject}"
descriptions = ["billing", "delivery", "returns"]
label_field = "topic"
scale = 20.0
max_tokens = 64
"""
PLAIN = b"One paragraph\nof two lines.\n\nAnother [one] {with} braces."
OTHER_TASKS = [
    b'kind = "choice"\ntemplate = "{q} is"\noptions = ["a", "b"]\nlabels = ["A", "B"]\noption = " {option}"\n',
    b'kind = "completion"\ntemplate = "{q}"\ncompletion = " {a}"\nchat = true\nsystem = "Be brief."\n',
    b'kind = "text"\nfield = "line"\nmax_tokens = 64\n',
]
SHORT_TASK = b'template = "{Review Text} It was"\nlabel_words = [" bad", " good"]\n'
NODE = b"""
id = "a"
federation = "f"
data = "rows.jsonl"
state_dir = "s"
[broker]
url = "mqtt://h:1883"
keep_alive_s = 5
"""
FEDERATION = b"""
federation = "f"
state_dir = "s"
task = "sst2"
[rounds]
count = 10
lr = 1e-3
[evaluation]
data = "d"
"""
PLAN = b"""
model = "demo"
passes = 8
nodes = 4
[[methods]]
name = "m"
lr = [1e-3]
mask = "sensitivity"
[[splits]]
how = "iid"
"""


def use_rows(path: Path) -> None:
    rows = read_rows(path, AGNEWS)
    for row in rows:
        fill(AGNEWS.template, row).encode()
    for number, part in enumerate(partition(rows, 1, "iid", seed=0)):
        write_rows(path.parent / "out" / f"node-{number}.jsonl", part)
        assert len(read_rows(path.parent / "out" / f"node-{number}.jsonl", AGNEWS)) == len(rows)


def use_texts(path: Path) -> None:
    for text in read_texts(path):
        text.encode()


def use_task(path: Path) -> None:
    task = load_task(path)
    example = task.example(task.row_of("<x>", 1))
    assert any("<x>" in text for text in (example.prompt, *example.candidates))
    if isinstance(task, Classification):
        row = {field: f"<{field}>" for field in task.fields}
        assert any(value in fill(task.template, row) for value in row.values())
    tomli_w.dumps(task.describe().model_dump(mode="json"))
    assert task_of(TaskDescription.model_validate_json(task.describe().encode())) == task


KINDS: dict[str, tuple[Callable[[Path], Any], list[bytes]]] = {
    "rows.jsonl": (use_rows, [LINES]),
    "rows.json": (use_rows, [json.dumps(ROWS).encode(), json.dumps(ROWS, indent=1).encode(), LINES]),
    "rows.csv": (use_rows, [TABLE]),
    "rows.tsv": (use_rows, [TABLE.replace(b",", b"\t")]),
    "rows.jsonl.gz": (use_rows, [gzip.compress(LINES, mtime=0)]),
    "text.jsonl": (use_texts, [LINES]),
    "text.csv": (use_texts, [TABLE]),
    "text.txt": (use_texts, [PLAIN, LINES, json.dumps(ROWS).encode()]),
    "task.toml": (use_task, [TASK, SHORT_TASK, *OTHER_TASKS]),
    "node.toml": (lambda path: load_config(path, NodeConfig), [NODE]),
    "federation.toml": (lambda path: load_config(path, ServerConfig), [FEDERATION]),
    "plan.toml": (lambda path: load_config(path, SweepPlan), [PLAN]),
}


@pytest.mark.timeout(60 + COUNT)
@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(tmp_path: Path, name: str) -> None:
    read, samples = KINDS[name]
    path, seen = tmp_path / name, Counter[str]()
    (tmp_path / "out").mkdir()
    for sample in samples:
        path.write_bytes(sample)
        assert read_or_refused(lambda: read(path), path, -1) is None
    for number, data in mutants(name, samples):
        path.write_bytes(data)
        refusal = read_or_refused(lambda: read(path), path, number)
        seen["read" if refusal is None else "refused"] += 1
        assert {file.name for file in tmp_path.iterdir()} == {name, "out"}
    assert seen["refused"] > COUNT // 5, "the damage does nothing"
    assert seen["read"] > 0, "no damage is small"
