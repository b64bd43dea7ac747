"""Kinds of H14 to H16: files of a model that say one thing to one reader, and another thing to the next."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.core.foreign import is_plain_name, open_regular, read_regular
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.torch import folder as folder_module
from meerkat_mq.engines.torch.checkpoint import stored_tensors, weight_files
from meerkat_mq.engines.torch.export import export_model
from meerkat_mq.engines.torch.folder import find_folder
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.errors import ModelError
from tests.engines import tiny


@pytest.mark.parametrize("name", ["a.safetensors", "model-00001-of-00002.safetensors", "é.safetensors"])
def test_names_that_are_plain(name: str) -> None:
    assert is_plain_name(name, ".safetensors")


@pytest.mark.parametrize(
    "name",
    ["", ".safetensors", ".a.safetensors", "../a.safetensors", "/a.safetensors", "a/b.safetensors", "a\\b.safetensors",
     "a\0.safetensors", "\x1b[2J.safetensors", "\u202e.safetensors", "a.bin", 3, None, "a" * 200 + ".safetensors"],
)  # fmt: skip
def test_names_that_are_none(name: object) -> None:
    assert not is_plain_name(name, ".safetensors")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    for name, words in (("pipe", "no regular file"), ("zeros", "no regular file"), (".", "directory")):
        with pytest.raises(OSError, match=words):
            open_regular(tmp_path / name)
    assert read_regular(tmp_path / "link") == b"12345"
    with pytest.raises(OSError, match="5 bytes; 4 are the most"):
        read_regular(tmp_path / "file", 4)


def stored(folder: Path, header: bytes, data: bytes = bytes(16)) -> Path:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    return folder


def test_two_tensors_of_one_name_in_a_header(tmp_path: Path) -> None:
    """One reader takes the first, another the last: the fingerprint would be of weights that nobody loads."""
    one, two = (f'{{"dtype": "F32", "shape": [2], "data_offsets": [{at}, {at + 8}]}}' for at in (0, 8))
    with pytest.raises(ModelError, match=r"is no safetensors file .*'a' comes twice"):
        stored_tensors(stored(tmp_path, f'{{"a": {one}, "a": {two}}}'.encode()))
    inner = one.replace("}", ', "data_offsets": [8, 16]}')
    with pytest.raises(ModelError, match=r"is no safetensors file .*'data_offsets' comes twice"):
        stored_tensors(stored(tmp_path, f'{{"a": {inner}}}'.encode()))


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_an_absurd_length(tmp_path: Path, length: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="is no safetensors file"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json", "tokenizer_config.json"])
def test_json_without_end(model: Path, name: str) -> None:
    """A sparse file of 200 MB costs its maker nothing; it is not read."""
    if name == "model.safetensors.index.json":
        (model / "model.safetensors").rename(model / "model-1.safetensors")
    with (model / name).open("r+b" if (model / name).exists() else "wb") as file:
        file.truncate(200 << 20)
    for look in (find_folder, load_model, weight_files if "index" in name else find_folder):
        with pytest.raises(ModelError, match=r"209,715,200 bytes; .* are the most"):
            look(model)


def rewrite(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.mark.parametrize(
    "key", ["vocab_file", "merges_file", "spm_file", "source_spm", "tokenizer_file", "init_inputs"]
)
@pytest.mark.parametrize("to", ["/etc/passwd", "../outside.txt", "sub/vocab.txt"])
def test_a_tokenizer_that_names_files_elsewhere(model: Path, key: str, to: str) -> None:
    """transformers opens what these keys name, wherever it lies, unless the folder has a file of that kind itself."""
    rewrite(model / "tokenizer_config.json", **{key: [to] if key == "init_inputs" else to})
    (model / "tokenizer.json").rename(model / "vocab.json")
    with pytest.raises(ModelError, match=rf"tokenizer_config\.json: {key}"):
        load_model(model)


def test_what_older_libraries_wrote_into_a_tokenizer_s_configuration(model: Path) -> None:
    """Paths of the machine on which it was made; beside a tokenizer.json nobody opens them."""
    here = {
        "tokenizer_file": "/home/ada/tokenizer.json",
        "special_tokens_map_file": "/home/ada/special_tokens_map.json",
    }
    rewrite(model / "tokenizer_config.json", **here, vocab_file=None, name_or_path="/home/ada/model")
    assert load_model(model).fingerprint


def test_nothing_is_written_through_a_hard_link(masks: dict[str, Mask], model: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim.safetensors"
    shutil.copy(model / "model.safetensors", victim)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").hardlink_to(victim)
    before = tiny.snapshot(model), victim.read_bytes()
    export_model(model, masks["llama"], masks["llama"].theta_0 + 1, tmp_path / "out")
    assert (tiny.snapshot(model), victim.read_bytes()) == before
    assert (tmp_path / "out" / "model.safetensors").stat().st_nlink == 1


@pytest.mark.parametrize("where", ["sub", "sub/deeper", "2_Dense"])
def test_code_in_a_folder_within(masks: dict[str, Mask], model: Path, where: str) -> None:
    """A configuration further down is not loaded, so its code does not run; the export holds it as a plain file."""
    (model / where).mkdir(parents=True)
    (model / where / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Evil"}}')
    (model / where / "evil.py").write_text("raise SystemExit('ran')")
    assert load_model(model).fingerprint == masks["llama"].fingerprint


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("twice", ["null", '{"AutoModel": "evil.Evil"}'])
def test_code_that_is_named_twice(model: Path, name: str, twice: str) -> None:
    """Of a key that is there twice, most readers take the last, and some the first: neither hides the other."""
    text = (model / name).read_text().rstrip().removesuffix("}")
    (model / name).write_text(f'{text}, "auto_map": {{"AutoModel": "evil.Evil"}}, "auto_map": {twice}}}')
    with pytest.raises(ModelError, match="the key 'auto_map' comes twice"):
        load_model(model)


def test_bounds_hold_what_real_models_have() -> None:
    """The largest tokenizer.json that we know has 33 MB, the largest index 3 MB."""
    assert folder_module._MOST_BYTES_ELSE >= 100 << 20
