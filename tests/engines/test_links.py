"""A model folder may come from anybody: nothing outside of it is read, and nothing but `out` is written."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.torch.checkpoint import stored_tensors, weight_files
from meerkat_mq.engines.torch.export import export_model
from meerkat_mq.engines.torch.folder import find_folder, model_files
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.errors import ModelError, ModelNotFound
from tests.engines import tiny


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file of somebody else's."""
    (tmp_path / "outside").mkdir()
    file = tmp_path / "outside" / "secret.safetensors"
    file.write_text("secret")
    file.chmod(0o444)
    return file


def refused(model: Path, mask: Mask, out: Path, words: str, error: type[ModelError] = ModelError) -> None:
    """Everything that opens a model says so, and export leaves all as it was."""
    before = tiny.snapshot(out.parent)
    for look in (load_model, find_folder, lambda folder: export_model(folder, mask, mask.theta_0, out)):
        with pytest.raises(error, match=words) as raised:
            look(model)
        assert "\n" not in str(raised.value)
        assert raised.value.remedy
    assert tiny.snapshot(out.parent) == before


# --- names in an index ---


def index(folder: Path, *names: object) -> Path:
    """Make the checkpoint one of shards, and one of its tensors in a file of each name."""
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    tensors = list(stored_tensors_of(folder / "model-1.safetensors"))
    table: dict[str, object] = dict.fromkeys(tensors, "model-1.safetensors")
    table |= dict(zip(tensors, names, strict=False))
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return file


def stored_tensors_of(file: Path) -> list[str]:
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return [name for name in header if name != "__metadata__"]


@pytest.mark.parametrize(
    "name",
    [
        "../outside/secret.safetensors",
        "../victim",
        "/etc/passwd",
        "/etc/x.safetensors",
        "sub/model-1.safetensors",
        "./model-1.safetensors",
        "a\\b.safetensors",
        "..",
        ".",
        "",
        ".hidden.safetensors",
        "nul\0.safetensors",
        "line\n.safetensors",
        "half\ud800.safetensors",
        "config.json",
        "model-1.bin",
        3,
        None,
        True,
        ["model-1.safetensors"],
        {"model-1.safetensors": 1},
    ],
)
def test_a_shard_is_a_plain_file_name(masks: dict[str, Mask], model: Path, outside: Path, name: object) -> None:
    """H14: the file that the name led to was overwritten, and its mode with it."""
    assert outside.is_file()
    file = index(model, name)
    with pytest.raises(ModelError, match=r"index\.json: weight_map: .* is no plain file name") as raised:
        weight_files(model)
    assert raised.value.where == str(file)
    out, before = model.parent / "out", tiny.snapshot(model.parent)
    for look in (load_model, lambda folder: export_model(folder, masks["llama"], masks["llama"].theta_0, out)):
        with pytest.raises(ModelError, match="is no plain file name"):
            look(model)
    assert tiny.snapshot(model.parent) == before


PARTS = st.sampled_from(
    ["..", "/", ".", "\\", "\0", "\n", "model-1", ".safetensors", "outside", "secret", "~", "%2e", "\ud800"]
)
NAMES = st.lists(PARTS, max_size=6).map("".join) | st.text() | st.integers() | st.none() | st.lists(st.text())


@settings(max_examples=150)
@given(names=st.lists(NAMES, min_size=1, max_size=4))
def test_any_names_in_an_index(tmp_path_factory: pytest.TempPathFactory, names: list[object]) -> None:
    """Whatever they are: one line of ours, or files of the folder."""
    folder = tmp_path_factory.getbasetemp() / "index-of-any-names"
    folder.mkdir(exist_ok=True)
    (folder / "model-1.safetensors").touch()
    table = {f"tensor {number}": name for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    try:
        said = ""
        files = weight_files(folder)
    except ModelError as error:
        files, said = [], str(error)
    assert said.isprintable()
    assert [file.parent for file in files] == [folder] * len(files)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"weight_map": {}}', '{"weight_map": null}', "\ud800"])
def test_an_index_of_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError, match=r"index\.json: (is no checkpoint index|weight_map: names no file)"):
        weight_files(tmp_path)


def test_a_tensor_in_two_shards(model: Path) -> None:
    index(model, "model-2.safetensors")
    shutil.copy(model / "model-1.safetensors", model / "model-2.safetensors")
    with pytest.raises(ModelError, match=r"model-2\.safetensors: holds .*, and so does model-1\.safetensors"):
        stored_tensors(model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_offsets", [-8, 0]),
        ("data_offsets", [0, 10**30]),
        ("data_offsets", [64, 0]),
        ("data_offsets", [0.0, 8]),
        ("data_offsets", [0]),
        ("shape", [-1]),
        ("shape", [2**70]),
        ("shape", [3]),
        ("shape", "ab"),
        ("dtype", ["F32"]),
    ],
)
def test_a_header_that_lies(tmp_path: Path, key: str, value: object) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | {key: value}
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError, match=r"model\.safetensors: is no safetensors file"):
        stored_tensors(tmp_path)


# --- links ---


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", "config.json", "model.safetensors", "sub/notes.txt"])
@pytest.mark.parametrize("how", ["absolute", "relative", "chain", "there and back", "into blobs that are a link"])
def test_links_out_of_the_folder(masks: dict[str, Mask], model: Path, outside: Path, name: str, how: str) -> None:
    """H15: root's export gave away what the link led to."""
    link = model / name
    link.parent.mkdir(exist_ok=True)
    back = outside.parent / "back"
    if link.exists():
        link.rename(model / "kept.json")
    else:
        (model / "kept.json").write_text("kept")
    target: Path | str = outside
    if how == "relative":
        target = os.path.relpath(outside, link.parent)
    elif how == "chain":
        (model / "step").symlink_to(outside)
        target = model / "step"
    elif how == "there and back":
        back.symlink_to(model / "kept.json")
        target = back
    elif how == "into blobs that are a link":
        (model.parent / "blobs").symlink_to(outside.parent)
        target = model.parent / "blobs" / outside.name
    link.symlink_to(target)
    refused(model, masks["llama"], model.parent / "out", "is a link out of the model folder, to ")


def test_links_within_the_folder_are_followed(masks: dict[str, Mask], model: Path) -> None:
    (model / "sub").mkdir()
    for file in ("model.safetensors", "tokenizer.json"):
        (model / file).rename(model / "sub" / file)
        (model / file).symlink_to(Path("sub", file))
    (model / "again.json").symlink_to(model / "tokenizer.json")
    export_model(model, masks["llama"], masks["llama"].theta_0 + 1, model.parent / "out")
    exported = [path for path in (model.parent / "out").rglob("*") if path.is_file()]
    assert {path.name for path in exported} >= {"again.json", "tokenizer.json", "model.safetensors", "config.json"}
    assert not any(path.is_symlink() for path in exported)
    assert load_model(model.parent / "out").fingerprint != masks["llama"].fingerprint
    assert load_model(model).fingerprint == masks["llama"].fingerprint


def cached(folders: dict[str, Path], root: Path) -> Path:
    """A snapshot as the hub's client leaves it: links to blobs."""
    repository = root / "hub" / "models--someone--llama"
    snapshot, blobs = repository / "snapshots" / "abc123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folders["llama"].iterdir())):
        shutil.copy(file, blobs / f"{number:040}")
        (snapshot / file.name).symlink_to(Path("../../blobs", f"{number:040}"))
    return snapshot


def test_the_links_of_a_hub_cache(folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path) -> None:
    folder = cached(folders, tmp_path)
    blobs = tiny.snapshot(tmp_path / "hub")
    (tmp_path / "here").symlink_to(folder)
    for number, base in enumerate((folder, tmp_path / "here")):
        out = tmp_path / f"out{number}"
        export_model(base, masks["llama"], masks["llama"].theta_0 + 1, out)
        assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        assert not (out / "model.safetensors").is_symlink()
    assert tiny.snapshot(tmp_path / "hub") == blobs


@pytest.mark.parametrize("to", ["../../../models--other--x/blobs/b", "../../refs/main", "../../blobs/leaves"])
def test_the_links_of_a_hub_cache_that_lead_elsewhere(
    folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path, outside: Path, to: str
) -> None:
    folder = cached(folders, tmp_path)
    for place in ("models--other--x/blobs/b", "models--someone--llama/refs/main"):
        (tmp_path / "hub" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / place).write_text("x")
    (folder.parents[1] / "blobs" / "leaves").symlink_to(outside)
    (folder / "extra.json").symlink_to(to)
    refused(folder, masks["llama"], tmp_path / "out", "is a link out of the model folder, to ")


# --- what is no file ---


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def a_folder_link(path: Path) -> None:
    path.with_name("sub").mkdir()
    path.symlink_to("sub")


def a_link_to_its_folder(path: Path) -> None:
    path.symlink_to(".")


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "config.json"])
@pytest.mark.parametrize("make", [a_pipe, a_socket, a_folder_link, a_link_to_its_folder])
def test_what_is_no_file(masks: dict[str, Mask], model: Path, name: str, make: Callable[[Path], None]) -> None:
    (model / name).unlink(missing_ok=True)
    make(model / name)
    refused(model, masks["llama"], model.parent / "out", f"{name}: is (no regular file|a link to a folder); ")


def test_a_device(masks: dict[str, Mask], model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("/dev/zero")
    refused(model, masks["llama"], model.parent / "out", "is a link out of the model folder, to /dev/zero")


@pytest.mark.parametrize("name", ["vocab.json", "model.safetensors"])
def test_a_dangling_link(masks: dict[str, Mask], model: Path, name: str) -> None:
    """A14: "cannot be written (None); choose another folder"."""
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("gone")
    problem = rf"{name}: is a link to .*gone, which is missing; fetch the model again"
    refused(model, masks["llama"], model.parent / "out", problem, ModelNotFound)


def test_links_in_a_circle(masks: dict[str, Mask], model: Path) -> None:
    (model / "a.json").symlink_to("b.json")
    (model / "b.json").symlink_to("a.json")
    refused(model, masks["llama"], model.parent / "out", r"a\.json: is a link that leads to itself")


def test_a_folder_that_is_no_model(outside: Path, tmp_path: Path) -> None:
    """Such as one's home: the links in it are not what is wrong."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "bin").symlink_to(outside)
    with pytest.raises(ModelNotFound, match=r"home: has no config\.json"):
        find_folder(tmp_path / "home")


def test_hidden_names_and_other_formats_are_not_opened(masks: dict[str, Mask], model: Path, outside: Path) -> None:
    (model / ".git").mkdir()
    (model / ".git" / "hook").symlink_to(outside)
    (model / "pytorch_model.bin").symlink_to(outside)
    os.mkfifo(model / ".pipe")
    export_model(model, masks["llama"], masks["llama"].theta_0, model.parent / "out")
    assert not {"pytorch_model.bin", ".git", ".pipe"} & {path.name for path in (model.parent / "out").iterdir()}
    assert not {"pytorch_model.bin", "hook"} & {path.name for path in model_files(model)}


def test_other_copies_of_the_weights_stay_behind(masks: dict[str, Mask], model: Path) -> None:
    """Loaders of other libraries prefer them, and they would hold the base."""
    for name in ("consolidated.safetensors", "model.fp16.safetensors"):
        shutil.copy(model / "model.safetensors", model / name)
    (model / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "b.safetensors"}}')
    (model / "2_Dense").mkdir()
    shutil.copy(model / "model.safetensors", model / "2_Dense" / "model.safetensors")
    export_model(model, masks["llama"], masks["llama"].theta_0, model.parent / "out")
    left = {str(path.relative_to(model.parent / "out")) for path in (model.parent / "out").rglob("*.safetensors*")}
    assert left == {"model.safetensors", "2_Dense/model.safetensors"}
