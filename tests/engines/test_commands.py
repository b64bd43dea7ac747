"""`meerkat mask`, `export` and `partition` with an adapter, all weights, and rows from CSV and data sets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat_mq.core.mask import Mask
from meerkat_mq.tasks.data import write_rows
from meerkat_mq.wire.snapshot import Difference
from tests.engines import tiny
from tests.support.command import Meerkat

pytestmark = pytest.mark.timeout(300)  # the first import of torch takes long on a busy machine


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder with one split."""
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "train.jsonl", tiny.ROWS)
    (tmp_path / "task.toml").write_text('template = "{line} It is"\nlabel_words = [" broken", " running"]\n')
    return tmp_path / "rows"


@pytest.mark.parametrize("method", [("dense",), ("lora", "--rank", 2)], ids=["dense", "lora"])
def test_mask_and_export(
    meerkat: Meerkat, tmp_path: Path, folders: dict[str, Path], method: tuple[object, ...]
) -> None:
    (tmp_path / "t.csv").write_text("".join(["text\n", *(f"{text}\n" for text in tiny.TEXTS)]))
    made = meerkat(
        *("mask", "--model", folders["llama-bf16"], "--text", tmp_path / "t.csv", "--out", tmp_path / "m.mkm"),
        *("--method", *method, "--sequences", 2, "--length", 32, "--dtype", "bfloat16"),
    )
    assert made.code == 0, made
    mask = Mask.load(tmp_path / "m.mkm")
    assert mask.size == mask.covered
    assert f"{mask.size:,} of {mask.size:,} weights in {len(mask.matrices)} matrices" in made.out
    theta = mask.theta_0 + np.float32(0.01)
    Difference(mask, theta, bytes(16), 3).save(tmp_path / "d.mkd")
    said = meerkat(
        "export", "--model", folders["llama-bf16"], "--difference", tmp_path / "d.mkd", "--out", tmp_path / "o"
    )
    assert f"version 3 of run 00000000, {mask.size:,} weights trained" in said.out
    assert (tmp_path / "o" / "model.safetensors").is_file()


def test_wrong_rank_and_dtype(meerkat: Meerkat, tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "t.txt").write_text("\n\n".join(tiny.TEXTS))
    command = ("mask", "--model", folders["llama"], "--text", tmp_path / "t.txt", "--out", tmp_path / "m.mkm")
    meerkat(*command, "--method", "lora", "--rank", 0).failed(4, "rank: 0 is outside 1…256")
    meerkat(*command, "--dtype", "float16").failed(4, "float16 rounds this checkpoint's weights; load it in float32")


def test_partition_of_a_data_set(meerkat: Meerkat, tmp_path: Path, rows: Path) -> None:
    arguments = ("--out", tmp_path / "shards", "--nodes", 2, "--task", tmp_path / "task.toml", "--split", "iid")
    assert meerkat("partition", f"hf:{rows}:train", *arguments).code == 0
    shards = [tmp_path / "shards" / f"node-{number}.jsonl" for number in range(2)]
    found = [json.loads(line) for shard in shards for line in shard.read_text().splitlines()]
    assert sorted(found, key=str) == sorted(tiny.ROWS, key=str)
    meerkat("partition", f"hf:{rows}:test", *arguments).failed(3, "rows:test: cannot be loaded")
    meerkat("partition", "hf:rows", *arguments).failed(3, "hf:rows: is no hf:<folder or hub id>[,<config>]:<split>")


def test_partition_of_csv(meerkat: Meerkat, tmp_path: Path, rows: Path) -> None:
    (tmp_path / "d.csv").write_text("line,label\none,0\ntwo,1\n")
    arguments = ("--out", tmp_path / "shards", "--nodes", 2, "--task", tmp_path / "task.toml", "--split", "iid")
    assert meerkat("partition", tmp_path / "d.csv", *arguments).code == 0
    assert '"label": ' in (tmp_path / "shards" / "node-0.jsonl").read_text()


def test_a_folder_keeps_one_division(meerkat: Meerkat, tmp_path: Path, rows: Path) -> None:
    shards = tmp_path / "shards"

    def divide(nodes: int, *more: object) -> Any:
        return meerkat("partition", rows, "--out", shards, "--nodes", nodes, "--task", tmp_path / "task.toml", *more)

    assert divide(6).code == 0
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    assert len(before) == 6
    for other in (divide(3), divide(8), divide(6, "--seed", 1)):
        other.failed(2, f"--out {shards}: holds node-", "of another division; name a new folder, or remove the node-*")
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before
    (shards / "node-3.jsonl").unlink()
    assert divide(6).code == 0
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before


def test_a_mask_that_is_replaced_is_spoken_of(meerkat: Meerkat, tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "t.txt").write_text("\n\n".join(tiny.TEXTS))
    command = ("mask", "--model", folders["llama"], "--text", tmp_path / "t.txt", "--out", tmp_path / "m.mkm")
    short = ("--sequences", 2, "--length", 16, "--density", 0.1, "--method", "magnitude")
    assert "in place of" not in meerkat(*command, *short).out
    assert "in place of the file that was there" in meerkat(*command, *short).out
