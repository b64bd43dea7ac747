"""The committed golden vectors are what the package makes, decodes and encodes again."""

import functools
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat_mq.core.batches import batch_rows
from meerkat_mq.core.directions import QUANTILES_SHA256
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import digest, short_hash
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.step import projected_gradient
from meerkat_mq.core.values import mean_displacement
from meerkat_mq.engines.toy import QuadraticEngine
from meerkat_mq.errors import MaskError, WireError
from meerkat_mq.wire import descriptor
from meerkat_mq.wire.arrays import decode_mask, encode_array, read_array
from meerkat_mq.wire.descriptor import ControlMessage, NodeStatus, decode_control
from meerkat_mq.wire.frames import decode, encode
from meerkat_mq.wire.reader import Reader
from meerkat_mq.wire.snapshot import decode_snapshot
from meerkat_mq.wire.values import decode_values, encode_values
from protocol import check_core
from protocol.make_golden import GOLDEN, build
from protocol.reference import __main__ as reference_main
from protocol.reference.check import check
from protocol.vectors_node import displaced_run
from protocol.vectors_wire import golden_frames, meaning

MAY_DIFFER = {"arrays.json", "mask.blob", "snapshot.blob", "snapshot.json", "values.json", "toy.json", "manifest.json"}
"""They hold what zstd packs, or a sum in an order of NumPy's own."""


def read(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text("utf-8"))


def data_of(text: str) -> bytes:
    return bytes(int(text.removeprefix("00*"))) if text.startswith("00*") else bytes.fromhex(text)


@pytest.mark.parametrize("name", sorted(set(build()) - MAY_DIFFER))
def test_the_package_makes_the_committed_file(name: str) -> None:
    assert build()[name] == (GOLDEN / name).read_bytes()


def test_the_manifest_lists_every_file_and_no_other() -> None:
    listed = {item["file"]: item for item in read("manifest.json")["files"]}
    assert {path.name for path in GOLDEN.iterdir()} == {*listed, "manifest.json"}
    for name, item in listed.items():
        data = (GOLDEN / name).read_bytes()
        assert (item["bytes"], item["sha256"]) == (len(data), hashlib.sha256(data).hexdigest()), name
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 200_000


@pytest.mark.parametrize("vector", read("frames.json")["frames"], ids=lambda v: v["name"])
def test_frames_decode_to_their_meaning_and_encode_to_their_bytes(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    frame = decode(data)
    assert repr(meaning(frame)) == repr(meaning(golden_frames()[vector["name"]]))
    assert (type(frame).__name__.lower(), meaning(frame)) == (vector["type"], vector["meaning"])
    assert encode(frame) == data


@pytest.mark.parametrize("vector", read("frames.json")["refused"], ids=lambda v: v["name"])
def test_hostile_frames_are_refused_by_name(vector: dict[str, Any]) -> None:
    with pytest.raises(WireError) as caught:
        decode(data_of(vector["hex"]))
    assert type(caught.value).__name__ == vector["error"]


def test_every_frame_type_has_several_vectors() -> None:
    types = [vector["type"] for vector in read("frames.json")["frames"]]
    assert set(types) == {"update", "round", "want", "welcome", "entries", "chunk", "refusal", "offer"}
    assert min(types.count(kind) for kind in types) >= 2


@pytest.mark.parametrize("vector", read("arrays.json")["arrays"], ids=lambda v: v["name"])
def test_arrays_decode_to_their_values_however_they_are_packed(vector: dict[str, Any]) -> None:
    for encoded in (bytes.fromhex(vector["encoded"]), None):
        expected = np.frombuffer(bytes.fromhex(vector["values"]), vector["dtype"])
        reader = Reader(encode_array(expected) if encoded is None else encoded)
        assert read_array(reader, vector["dtype"], vector["count"]).tobytes().hex() == vector["values"]
        reader.end()


@pytest.mark.parametrize("vector", read("arrays.json")["refused"], ids=lambda v: v["name"])
def test_hostile_arrays_are_refused_by_name(vector: dict[str, Any]) -> None:
    with pytest.raises(WireError) as caught:
        read_array(Reader(bytes.fromhex(vector["hex"])), "<u4", 6)
    assert type(caught.value).__name__ == vector["error"]


def test_the_mask_file_and_its_blob_are_the_same_mask() -> None:
    data, said = (GOLDEN / "mask.bin").read_bytes(), read("mask.json")
    mask = Mask.from_bytes(data)
    assert mask.to_bytes() == data
    assert mask.hash.hex() == said["hash"]
    assert [matrix.name for matrix in mask.matrices] == [matrix["name"] for matrix in said["matrices"]]
    assert decode_mask((GOLDEN / "mask.blob").read_bytes(), mask.hash, mask.size).to_bytes() == data


@pytest.mark.parametrize("vector", read("mask.json")["refused"], ids=lambda v: v["name"])
def test_hostile_mask_files_are_refused(vector: dict[str, Any]) -> None:
    with pytest.raises(MaskError):
        Mask.from_bytes(bytes.fromhex(vector["hex"]))


def test_the_snapshot_is_where_the_first_run_of_the_path_ends() -> None:
    blob, said, run = (GOLDEN / "snapshot.blob").read_bytes(), read("snapshot.json"), read("path.json")["runs"][0]
    found = decode_snapshot(blob, bytes.fromhex(said["hash"]), len(said["theta"]) // 8)
    assert found.theta.tobytes().hex() == said["theta"] == run["theta"]
    assert (found.run_id.hex(), found.version) == (said["run_id"], said["version"]) == (run["run_id"], 4)
    assert found.head.hex() == said["head"] == run["entries"][-1]["hash"]
    assert digest(found.theta).hex() == said["digest"] == run["entries"][-1]["digest"]


@pytest.mark.parametrize("vector", read("snapshot.json")["refused"], ids=lambda v: v["name"])
def test_hostile_snapshots_are_refused_by_name(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    with pytest.raises(WireError) as caught:
        decode_snapshot(data, short_hash(data), Mask.from_bytes((GOLDEN / "mask.bin").read_bytes()).size)
    assert type(caught.value).__name__ == vector["error"]


@pytest.mark.parametrize("vector", read("values.json")["blobs"], ids=lambda v: v["name"])
def test_values_blobs_decode_to_what_their_codec_keeps(vector: dict[str, Any]) -> None:
    blob, given = bytes.fromhex(vector["encoded"]), np.frombuffer(bytes.fromhex(vector["values"]), np.float32)
    for each in (blob, encode_values(given, vector["codec"])):
        assert decode_values(each, short_hash(each), vector["count"]).tobytes().hex() == vector["decoded"]
    assert short_hash(blob).hex() == vector["hash"]


@pytest.mark.parametrize("vector", read("values.json")["refused"], ids=lambda v: v["name"])
def test_hostile_values_blobs_are_refused_by_name(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    with pytest.raises(WireError) as caught:
        decode_values(data, short_hash(data), read("values.json")["refused_of"])
    assert type(caught.value).__name__ == vector["error"]


@pytest.mark.parametrize("vector", read("values.json")["means"], ids=lambda v: len(v["weights"]))
def test_means_are_added_up_in_their_order(vector: dict[str, Any]) -> None:
    parts = [np.frombuffer(bytes.fromhex(part), np.float32) for part in vector["values"]]
    weights = [float.fromhex(weight) for weight in vector["weights"]]
    assert mean_displacement(zip(weights, parts, strict=True), 12).tobytes().hex() == vector["mean"]


def test_a_replica_walks_the_run_with_displacements() -> None:
    (run,) = read("values.json")["runs"]
    mask = Mask.from_bytes((GOLDEN / "mask.bin").read_bytes())
    entries, theta, blobs = displaced_run(mask)
    replica = Replica(mask, run_id=bytes.fromhex(run["run_id"]), stream=run["stream"], digest_every=1)
    for entry, said in zip(entries, run["entries"], strict=True):
        assert entry.displacement is not None
        blob = bytes.fromhex(run["blobs"][said["displacement"]["blob"]])
        after = replica.apply(entry.terms, decode_values(blob, short_hash(blob), mask.size))
        assert after.hex() == said["digest"]
    assert replica.theta.tobytes().hex() == theta.tobytes().hex() == run["theta"]
    assert blobs.keys() == run["blobs"].keys()


def test_the_toy_engine_measures_what_its_vectors_say() -> None:
    file = read("toy.json")
    for v in file["batches"]:
        place = (bytes.fromhex(v["run_id"]), v["node"], v["rows"], v["batch_size"], v["step"])
        assert batch_rows(*place) == v["numbers"]
    for v in file["gradients"]:
        theta, z = (np.frombuffer(bytes.fromhex(v[key]), np.float32) for key in ("theta", "z"))
        engine = QuadraticEngine(theta.size)
        batch = engine.prepare([{"seed": int(seed, 16)} for seed in v["rows"]])
        g, loss = projected_gradient(engine, theta, z, v["eps"], batch)
        assert g == pytest.approx(v["g"], abs=v["tolerance"])
        assert loss == pytest.approx(v["loss"], rel=1e-6)


@pytest.mark.parametrize("vector", read("control.json")["messages"], ids=lambda v: v["kind"])
def test_control_messages_decode_and_encode_to_the_same_text(vector: dict[str, Any]) -> None:
    kind: type[ControlMessage] = getattr(descriptor, vector["kind"])
    assert decode_control(vector["json"].encode(), kind).encode().decode() == vector["json"]


@pytest.mark.parametrize("text", read("control.json")["refused_as_node_status"])
def test_control_junk_is_refused(text: str) -> None:
    with pytest.raises(WireError):
        decode_control(text.encode(), NodeStatus)


def test_the_reference_agrees_with_every_vector() -> None:
    found = dict(check(GOLDEN))
    assert [name for name, holds in found.items() if not holds] == []
    assert len(found) > 100
    assert reference_main.main(GOLDEN) == 0


def test_the_core_check_agrees() -> None:
    assert set(check_core.check(GOLDEN).values()) == {True}
    assert check_core.main(GOLDEN) == 0


def test_the_core_check_agrees_on_a_plain_processor() -> None:
    """Without the instructions that NumPy chooses by processor, as on an older one or another kind."""
    features = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    plain = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(features)}
    subprocess.run([sys.executable, "-m", "protocol.check_core"], env=plain, cwd=GOLDEN.parents[1], check=True)


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("directions.json", '"float32": "', '"float32": "00'),
        ("path.json", '"seed": "0x5e', '"seed": "0x5f'),
        ("path.json", '"coefficient": 0.0002192999963881448', '"coefficient": 0.00021929998183622956'),
        ("path.json", '"product": -1.2543830871582031', '"product": -1.2543832063674927'),
        ("path.json", '"perturbations": 2', '"perturbations": 1'),
        ("mask.json", '"hash": "c', '"hash": "d'),
        ("frames.json", '"loss": 1.38', '"loss": 1.39'),
        ("frames.json", '"error": "UnknownFlags"', '"error": "BadValue"'),
        ("arrays.json", '"values": "', '"values": "00'),
        ("path.json", '"age": 1', '"age": 0'),
        ("values.json", '"decoded": "', '"decoded": "00'),
        ("values.json", '"mean": "', '"mean": "00'),
        ("toy.json", '"numbers": [', '"numbers": [9, '),
    ],
)
def test_the_checks_notice_a_changed_vector(tmp_path: Path, file: str, before: str, after: str) -> None:
    golden = tmp_path / "golden"
    shutil.copytree(GOLDEN, golden)
    text = (golden / file).read_text("utf-8")
    assert before in text
    (golden / file).write_text(text.replace(before, after, 1), "utf-8")
    assert reference_main.main(golden) == 1
    if file in {"directions.json", "path.json", "mask.json"}:
        assert check_core.main(golden) == 1


def test_the_reference_does_not_import_the_package() -> None:
    for path in (Path(reference_main.__file__).parent).glob("*.py"):
        text = path.read_text("utf-8")
        assert "import meerkat_mq" not in text
        assert "from meerkat_mq" not in text
        assert "numpy" not in text.lower()


def test_the_coefficients_in_the_specification_give_the_quantile_table() -> None:
    text = (GOLDEN.parent / "SPECIFICATION.md").read_text("utf-8")
    rows = text.split("| A | B | C | D |\n|---|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    a, b, c, d = zip(*([float(cell) for cell in row.strip("| ").split("|")] for row in rows), strict=True)

    def horner(coefficients: tuple[float, ...], r: float) -> float:
        return functools.reduce(lambda total, coefficient: total * r + coefficient, coefficients)

    def quantile(p: float) -> float:
        q = p - 0.5
        if abs(q) <= 0.425:
            r = 0.180625 - q * q
            return q * horner(a, r) / horner(b, r)
        r = math.sqrt(-math.log(min(p, 1 - p))) - 1.6
        return math.copysign(horner(c, r) / horner(d, r), q)

    scale = float.fromhex("0x1.fffeabbbd59e9p-1")
    table = np.array([quantile((i + 0.5) / 65536) / scale for i in range(65536)], "<f4")
    assert hashlib.sha256(table.tobytes()).hexdigest() == QUANTILES_SHA256
