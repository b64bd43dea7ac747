"""A bundle over HTTP: whole or not at all, whatever the server and the network do, within bytes and time."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.config import BundleConfig, NodeConfig, check_config
from meerkat_mq.errors import ConfigError, ModelError
from tests.engines.onnx.conftest import Bundled
from tests.support.web import serving

FILES = ["bundle.json", "graph.onnx", "tokenizer.json", "weights.safetensors"]


class Web(ThreadingHTTPServer):
    """Serves files of a table, and does what it is told to do wrong.

    Attributes:
        files: bytes by name.
        asked: (name, first byte) of each request.
        cut: so many bytes of an answer, then the connection breaks; None: all.
        ranges: whether parts can be asked for.
        statuses: instead of an answer, as long as there are any.
        target: where every request is redirected to.
        silent: no answer before this is set.
        drip_s: a byte in so many seconds.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Page)
        self.files = files
        self.asked: list[tuple[str, int]] = []
        self.cut: int | None = None
        self.ranges = True
        self.statuses: list[int] = []
        self.target: str | None = None
        self.silent: threading.Event | None = None
        self.drip_s: float | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/some/bundle"

    def wanted(self, **changes: Any) -> BundleConfig:
        sha256 = hashlib.sha256(self.files["bundle.json"]).hexdigest()
        given: dict[str, Any] = {"url": self.url, "sha256": sha256, "timeout_s": 60.0}
        return BundleConfig(**given | changes)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client went away: that is its right."""


class Page(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        web, name = self.server, self.path.removeprefix("/some/bundle/")
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        web.asked.append((name, first))
        if web.silent is not None:
            web.silent.wait(30)
        status = web.statuses.pop(0) if web.statuses else 302 if web.target else 200 if name in web.files else 404
        if status != 200:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.send_header("Location", web.target or "")
            self.end_headers()
            return
        whole = web.files[name]
        part = whole[first:] if web.ranges else whole
        self.send_response(206 if web.ranges and first else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if web.drip_s is not None:
            for place in range(100):
                self.wfile.write(part[place : place + 1])
                time.sleep(web.drip_s)
        else:
            self.wfile.write(part[: web.cut])
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def web(bundled: Bundled, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr("meerkat_mq.engines.onnx.fetch._TROUBLE_S", (0.001, 0.004))
    monkeypatch.setattr("meerkat_mq.engines.onnx.fetch._WRONG_S", (0.002, 0.008))
    folder = bundled("llama", "int8")[1]
    with serving(Web({name: (folder / name).read_bytes() for name in FILES})) as server:
        yield server


def fetch(
    wanted: BundleConfig, folder: Path, say: Callable[[str], None] | None = None, stop: threading.Event | None = None
) -> None:
    """Fetch; without `say`, nothing may go wrong."""
    from meerkat_mq.engines.onnx.fetch import fetch_bundle

    def fail(problem: str) -> None:
        raise AssertionError(problem)

    fetch_bundle(wanted, folder, say or fail, stop or threading.Event())


def told(wanted: BundleConfig, folder: Path, tries: int = 1) -> list[str]:
    """What the first tries are told to be wrong; then it is stopped."""
    said, stop = list[str](), threading.Event()

    def say(problem: str) -> None:
        said.append(problem)
        if len(said) == tries:
            stop.set()

    fetch(wanted, folder, say, stop)
    assert len(said) == tries
    assert not (folder / "bundle.json").exists()
    return said


def look(folder: Path) -> None:
    from meerkat_mq.engines.onnx.manifest import open_bundle

    assert sorted(path.name for path in folder.iterdir()) == FILES
    open_bundle(folder)


def test_a_bundle_is_fetched_once(web: Web, tmp_path: Path) -> None:
    folder = tmp_path / "some" / "where"
    fetch(web.wanted(url=f"{web.url}/"), folder)
    look(folder)
    assert sorted(web.asked) == [(name, 0) for name in FILES]
    fetch(web.wanted(), folder)
    assert len(web.asked) == 4


def test_a_connection_that_breaks_goes_on_where_it_broke(web: Web, tmp_path: Path) -> None:
    web.cut = 20_000
    said: list[str] = []
    fetch(web.wanted(), tmp_path / "bundle", said.append)
    look(tmp_path / "bundle")
    places = [first for name, first in web.asked if name == "weights.safetensors"]
    assert places == list(range(0, len(web.files["weights.safetensors"]), 20_000))
    assert any(
        "weights.safetensors: the connection broke off after 20,000 bytes; trying again in 0.001 s" in s for s in said
    )


def test_a_server_without_ranges_and_one_that_is_ill_for_a_while(web: Web, tmp_path: Path) -> None:
    web.cut = 20_000
    web.ranges = False
    web.statuses = [503, 404, 429, 500]
    said: list[str] = []

    def mend(problem: str) -> None:
        said.append(problem)
        web.cut = None if len(said) > 8 else web.cut

    fetch(web.wanted(), tmp_path / "bundle", mend)
    look(tmp_path / "bundle")
    for status, pause, problem in zip((503, 404, 429, 500), ("0.001", "0.002", "0.004", "0.004"), said, strict=False):
        assert problem.endswith(f"/some/bundle/bundle.json: the server answers {status}; trying again in {pause} s")


def test_a_part_that_is_no_beginning_of_the_file(web: Web, tmp_path: Path) -> None:
    folder, size = tmp_path / "bundle", len(web.files["graph.onnx"])
    for there in (10, size, size + 5):
        web.asked.clear()
        folder.mkdir(exist_ok=True)
        (folder / "graph.onnx.part").write_bytes(bytes(there))
        said: list[str] = []
        fetch(web.wanted(), folder, said.append)
        look(folder)
        assert [first for name, first in web.asked if name == "graph.onnx"] == [10, 0][there > 10 :]
        assert ["graph.onnx: has the SHA-256" in problem for problem in said] == [True][there > 10 :]
        for file in folder.iterdir():
            file.unlink()
    (folder / "graph.onnx.part").write_bytes(bytes(3))
    web.statuses = [200, 416]
    assert told(web.wanted(), folder)[0].endswith("graph.onnx: the server answers 416; trying again in 0.001 s")
    fetch(web.wanted(), folder)
    look(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_byte_is_told_and_nothing_is_left_of_it(web: Web, tmp_path: Path, name: str) -> None:
    wanted, whole, folder = web.wanted(), web.files[name], tmp_path / "bundle"
    web.files[name] = whole[:-1] + bytes([whole[-1] ^ 1])
    said = told(wanted, folder, tries=4)
    assert all(f"{name}: has the SHA-256 " in problem for problem in said)
    assert [problem.rpartition("in ")[2] for problem in said] == ["0.002 s", "0.004 s", "0.008 s", "0.008 s"]
    assert "bundle.url and bundle.sha256 must be those of one bundle" in said[0]
    assert not (folder / f"{name}.part").exists()
    web.files[name] = whole
    fetch(wanted, folder)
    look(folder)


def test_more_bytes_than_there_may_be(web: Web, tmp_path: Path) -> None:
    wanted = web.wanted()
    web.files["graph.onnx"] += bytes(1)
    assert "graph.onnx: is larger than " in told(wanted, tmp_path / "one")[0]
    web.files["graph.onnx"] = web.files["graph.onnx"][:-1]
    table = json.loads(web.files["bundle.json"])
    table["files"]["weights.safetensors"]["bytes"] = 5 << 20
    web.files["bundle.json"] = json.dumps(table).encode()
    web.asked.clear()
    with pytest.raises(ModelError, match=r"/some/bundle: has [\d,]+ bytes, more than max_mib = 5 allows; raise"):
        fetch(web.wanted(max_mib=5), tmp_path / "two")
    assert web.asked == [("bundle.json", 0)]


def test_a_manifest_without_an_end(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meerkat_mq.engines.onnx.fetch.MOST_MANIFEST", 1000)
    assert "bundle.json: is larger than 1,000 bytes" in told(web.wanted(), tmp_path / "bundle")[0]
    assert not (tmp_path / "bundle" / "bundle.json.part").exists()


def test_a_manifest_that_is_right_by_its_hash_and_is_none(web: Web, tmp_path: Path) -> None:
    for text in (b"[]", b"{", json.dumps({"format": 1}).encode()):
        web.files["bundle.json"] = text
        with pytest.raises(ModelError, match=r"http://127.*/bundle\.json"):
            fetch(web.wanted(), tmp_path / "bundle")
        assert not (tmp_path / "bundle" / "bundle.json").exists()


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "http://127.0.0.1:1/"])
def test_a_redirection_leads_to_no_other_place_than_the_web(web: Web, tmp_path: Path, target: str) -> None:
    web.target = target
    (problem,) = told(web.wanted(), tmp_path / "bundle")
    assert any(words in problem for words in ("the server answers 302", "unknown url type", "Connection refused"))
    assert list((tmp_path / "bundle").iterdir()) == []


def test_a_server_that_says_nothing_too_little_or_is_not_there(web: Web, tmp_path: Path) -> None:
    web.silent = threading.Event()
    assert "bundle.json: timed out; trying again" in told(web.wanted(timeout_s=0.2), tmp_path / "bundle")[0]
    web.silent.set()
    assert "Connection refused" in told(web.wanted(url="http://127.0.0.1:1/x"), tmp_path / "bundle")[0]
    web.drip_s = 0.05
    (problem,) = told(web.wanted(timeout_s=0.3), tmp_path / "bundle")
    assert "bundle.json: a connection lasts at most timeout_s = 0.3; trying" in problem


def test_it_can_be_stopped_and_goes_on_later(web: Web, tmp_path: Path) -> None:
    stop, folder = threading.Event(), tmp_path / "bundle"
    web.cut = 20_000

    def enough(problem: str) -> None:
        if "weights" in problem:
            stop.set()

    fetch(web.wanted(), folder, enough, stop)
    assert not (folder / "bundle.json").exists()
    assert (folder / "weights.safetensors.part").stat().st_size == 20_000
    web.asked.clear()
    web.cut = None
    fetch(web.wanted(), folder)
    look(folder)
    assert web.asked == [("weights.safetensors", 20_000)]


def test_a_disk_that_takes_nothing_for_a_while(web: Web, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def mend(problem: str) -> None:
        assert "Not a directory" in problem or "File exists" in problem
        (tmp_path / "file").unlink()

    fetch(web.wanted(), tmp_path / "file" / "bundle", mend)
    look(tmp_path / "file" / "bundle")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"engine": None}, r'\[bundle\] is for nodes with engine = "onnx"'),
        ({"model": "bundle"}, r"model and \[bundle\]: give one of them"),
        ({"bundle": {"url": "file:///etc", "sha256": "0" * 64}}, r"bundle\.url"),
        ({"bundle": {"url": "http://me:secret@x/y", "sha256": "0" * 64}}, r"bundle\.url"),
        ({"bundle": {"url": "http://x/y?z=1", "sha256": "0" * 64}}, r"bundle\.url"),
        ({"bundle": {"url": "http://x/y", "sha256": "0" * 63}}, r"bundle\.sha256"),
        ({"bundle": {"url": "http://x/y"}}, r"bundle\.sha256"),
        ({"bundle": {"url": "http://x/y", "sha256": "0" * 64, "timeout_s": 0}}, r"bundle\.timeout_s"),
    ],
)
def test_configurations_that_make_no_sense(changes: dict[str, Any], problem: str) -> None:
    table = {
        "id": "n", "federation": "f", "data": "rows.jsonl", "state_dir": "s", "engine": "onnx",
        "bundle": {"url": "https://example.org/b", "sha256": "0" * 64},
    }  # fmt: skip
    check_config(table, NodeConfig, where="node.toml")
    with pytest.raises(ConfigError, match=problem) as caught:
        check_config(table | changes, NodeConfig, where="node.toml")
    assert "secret" not in str(caught.value)
