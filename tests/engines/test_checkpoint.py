"""Fingerprints: over all tensors, whatever the files; cached; damage is named."""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from meerkat_mq.engines.torch import checkpoint
from meerkat_mq.engines.torch.checkpoint import fingerprint, stored_tensors
from meerkat_mq.errors import ModelError, ModelNotFound
from tests.engines import tiny


def by_hand(folder: Path) -> bytes:
    digest = hashlib.sha256()
    tensors = load_file(folder / "model.safetensors")
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0F32\0{','.join(map(str, tensor.shape))}\0".encode() + tensor.numpy().tobytes())
    return digest.digest()


def write_checkpoint(folder: Path, **tensors: np.ndarray) -> Path:
    table, data = {}, b""
    for name, values in tensors.items():
        end = len(data) + values.nbytes
        table[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [len(data), end]}
        data += values.tobytes()
    header = json.dumps(table).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return folder


def test_golden_fingerprint(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "m", b=np.arange(6, dtype=np.float32).reshape(2, 3), a=np.array([1.5], dtype=np.float32)
    )
    assert fingerprint(folder).hex() == "82ec3d8cb89e17386a3fddd0ad567357d11fa2d02b9f05e5b5f9e7c4dadf18ca"


def test_fingerprint_covers_every_tensor(folders: dict[str, Path], tmp_path: Path) -> None:
    assert fingerprint(folders["llama"], tmp_path / "c.json") == by_hand(folders["llama"])


def test_shards_do_not_change_the_fingerprint(folders: dict[str, Path], tmp_path: Path) -> None:
    sharded = tiny.save(tiny.llama(), tmp_path / "sharded", max_shard_size="40KB")
    assert len(checkpoint.weight_files(sharded)) > 1
    assert fingerprint(sharded) == fingerprint(folders["llama"])


def test_one_bit_changes_the_fingerprint(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32)
    first = fingerprint(write_checkpoint(tmp_path / "m", a=values))
    values[3] = np.nextafter(values[3], 9, dtype=np.float32)
    assert fingerprint(write_checkpoint(tmp_path / "n", a=values)) != first


def test_name_shape_and_place_matter(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32)
    variants = [
        write_checkpoint(tmp_path / "1", a=values),
        write_checkpoint(tmp_path / "2", b=values),
        write_checkpoint(tmp_path / "3", a=values.reshape(2, 3)),
        write_checkpoint(tmp_path / "4", a=values[:3], b=values[3:]),
    ]
    assert len({fingerprint(folder) for folder in variants}) == 4


def test_cached_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = write_checkpoint(tmp_path / "m", a=np.ones(4, dtype=np.float32)), tmp_path / "c" / "cache.json"
    first = fingerprint(folder, cache)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "hash_of", lambda _: pytest.fail("read again"))
        assert fingerprint(folder, cache) == first
    write_checkpoint(folder, a=np.zeros(4, dtype=np.float32))
    os.utime(folder / "model.safetensors", ns=(0, 1))
    assert fingerprint(folder, cache) != first


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}'])
def test_a_broken_cache_is_ignored(tmp_path: Path, content: str) -> None:
    cache = tmp_path / "cache.json"
    cache.write_text(content)
    folder = write_checkpoint(tmp_path / "m", a=np.ones(4, dtype=np.float32))
    assert fingerprint(folder, cache) == fingerprint(folder, tmp_path / "other.json")


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = write_checkpoint(tmp_path / "m", a=np.ones(4, dtype=np.float32))
    assert len(fingerprint(folder, tmp_path / "file" / "cache.json")) == 32


def test_no_safetensors(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match=r"has no model\.safetensors; .*save_pretrained"):
        fingerprint(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    sharded = tiny.save(tiny.llama(), tmp_path / "sharded", max_shard_size="40KB")
    gone = checkpoint.weight_files(sharded)[1]
    gone.unlink()
    with pytest.raises(ModelNotFound, match=gone.name):
        fingerprint(sharded)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", b"\xff" * 64, struct.pack("<Q", 4) + b"oops", b"\2\0\0\0\0\0\0\0[]"]
)
def test_damaged_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: is no safetensors file"):
        stored_tensors(tmp_path)


def with_header(folder: Path, table: dict[str, Any]) -> Path:
    header = json.dumps(table).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    return folder


@pytest.mark.parametrize("name", ["\x1b[2J", "x" * 256, "\ud83d", "a\nb", "\u202e"])
def test_names_that_cannot_be_shown(tmp_path: Path, name: str) -> None:
    with_header(tmp_path, {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}})
    with pytest.raises(ModelError, match=r"is no safetensors file \('.+' is no name of a tensor\); fetch") as caught:
        stored_tensors(tmp_path)
    assert (caught.value.where + caught.value.problem).isprintable()
    assert len(str(caught.value)) - len(str(tmp_path)) < 400


@pytest.mark.parametrize(
    "keys",
    [
        {"dtype": "x" * 3000},
        {"dtype": "\x1b[2J"},
        {"shape": "\x1b[2J"},
        {"shape": ["\x1b[2J" * 500]},
        {"data_offsets": ["\x1b[2J", "x" * 3000]},
        {"dtype": 7},
        {"dtype": None, "shape": {}},
    ],
)
def test_entries_that_cannot_be_shown(tmp_path: Path, keys: dict[str, Any]) -> None:
    with_header(tmp_path, {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | keys})
    with pytest.raises(ModelError, match=r"is no safetensors file \(.+\); fetch") as caught:
        stored_tensors(tmp_path)
    assert (caught.value.where + caught.value.problem).isprintable()
    assert len(str(caught.value)) - len(str(tmp_path)) < 400


def test_a_format_of_numbers_that_nobody_knows_yet(tmp_path: Path) -> None:
    with_header(tmp_path, {"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}})
    assert stored_tensors(tmp_path)["a"].dtype == "F6_E2M3"


def test_cut_short(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", a=np.ones(400, dtype=np.float32))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="bytes instead of"):
        fingerprint(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_damaged_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match="is no checkpoint index"):
        fingerprint(tmp_path)
