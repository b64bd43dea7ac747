"""The node's state folder."""

import errno
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from meerkat_mq.core.lock import Holder
from meerkat_mq.core.path import short_hash
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.errors import ConfigError
from meerkat_mq.node.state import NodeState
from meerkat_mq.runtime.model import KeptUpdate
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import Header, Update, Values


def test_steps_go_on_where_the_last_process_stopped_and_start_again_with_a_run(tmp_path: Path) -> None:
    with NodeState(tmp_path) as state:
        assert [state.take_steps("a", 3), state.take_steps("a", 2)] == [0, 3]
    with NodeState(tmp_path) as state:
        assert state.take_steps("a", 1) == 5
        assert state.take_steps("b", 1) == 0


@pytest.mark.parametrize(
    "damage",
    [
        "", "{", "[]", '{"run": "a"}', '{"run": "a", "steps": null}', "\x00", "[" * 100_000,
        *(f'{{"run": "a", "steps": {steps}}}' for steps in ("Infinity", "NaN", "1e999", "-7", "9" * 400)),
    ],
)  # fmt: skip
def test_a_damaged_counter_starts_again(tmp_path: Path, damage: str) -> None:
    (tmp_path / "steps.json").write_text(damage)
    with NodeState(tmp_path) as state:
        assert [state.take_steps("a", 1), state.take_steps("a", 1)] == [0, 1]


def test_only_the_newest_mask_is_kept(tmp_path: Path) -> None:
    with NodeState(tmp_path) as state:
        for size in (3, 4):
            state.keep_mask(toy_mask(size))
        assert state.load_mask(toy_mask(3).hash) is None
        kept = state.load_mask(toy_mask(4).hash)
    assert kept is not None
    assert kept.size == 4
    assert len(list(tmp_path.glob("mask-*"))) == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"state_dir .*file/state: cannot be used \(Not a directory\); name a folder"),
        NodeState(tmp_path / "file" / "state"),
    ):
        pass


def test_what_the_disk_does_not_take_is_kept_in_memory_and_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that vanishes, as an unmounted volume does, stands for any disk that takes nothing for a while."""
    monkeypatch.setattr("meerkat_mq.node.state.AGAIN_S", 0.0)
    folder = tmp_path / "state"
    with NodeState(folder) as state, capture_logs() as logs:
        (folder / "lock").unlink()
        folder.rmdir()
        state.keep_mask(toy_mask(3))
        state.keep_update(RUN, PATH)
        assert [state.take_steps("a", 2), state.take_steps("a", 1)] == [0, 2]
        folder.mkdir()
        assert state.take_steps("a", 1) == 3
    said = [(line["event"], line["file"]) for line in logs]
    assert said[:3] == [("not written, trying again later", file) for file in ("mask", "update", "step counter")]
    assert sorted(said[-3:]) == [("written again", file) for file in ("mask", "step counter", "update")]
    with NodeState(folder) as state:
        assert state.take_steps("a", 1) == 4
        assert state.load_mask(toy_mask(3).hash) is not None
        assert state.load_update(RUN) == PATH


def test_an_update_that_was_forgotten_meanwhile_is_not_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("meerkat_mq.node.state.AGAIN_S", 0.0)
    with NodeState(tmp_path) as state:
        with monkeypatch.context() as patched:
            patched.setattr("meerkat_mq.node.state.write_atomically", full)
            state.keep_update(RUN, PATH)
        state.forget_update()
        state.take_steps("a", 1)
        assert state.load_update(RUN) is None


# --- the lock ---


def test_a_disk_that_takes_nothing_for_a_while_does_not_keep_a_node_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read-only since an error, say; but the state folder was used before."""
    opened = os.open

    def read_only(path: Path, flags: int, *mode: int) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *mode)

    with NodeState(tmp_path) as state:
        state.take_steps("a", 3)
    monkeypatch.setattr(os, "open", read_only)
    with NodeState(tmp_path) as state, pytest.raises(ConfigError, match="in use"), NodeState(tmp_path):
        pass
    with NodeState(tmp_path) as state:
        assert [state.take_steps("a", 1), state.take_steps("a", 1)] == [3, 4]
    with pytest.raises(ConfigError, match=r"cannot be used \(Read-only file system\)"), NodeState(tmp_path / "new"):
        pass


HOLDS = """
import sys
from pathlib import Path
from meerkat_mq.node.state import NodeState
with NodeState(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holding(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def without_flock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)


def test_one_process_holds_the_folder_and_is_named(tmp_path: Path) -> None:
    with NodeState(tmp_path), pytest.raises(ConfigError, match="is in use"), NodeState(tmp_path):
        pass
    with holding(tmp_path) as process:
        holder = rf"another node process: process {process.pid} on host {socket.gethostname()}, since 20\d\d-.*; end it"
        with pytest.raises(ConfigError, match=holder), NodeState(tmp_path):
            pass
        process.kill()
    with NodeState(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_volume_without_flock_keeps_a_running_process_of_this_host_out_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with holding(tmp_path) as process:
        without_flock(monkeypatch, number)
        with pytest.raises(ConfigError, match=rf"process {process.pid} on host"), NodeState(tmp_path):
            pass
        process.kill()
    with capture_logs() as logs, NodeState(tmp_path) as state:
        assert state.take_steps("a", 1) == 0
    assert [line["event"] for line in logs] == ["no locks on this volume"]


@pytest.mark.parametrize("change", [{"host": "recreated"}, {"boot": "another"}, {"started": "1"}])
def test_what_a_container_that_is_no_more_left_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    holder = asdict(replace(Holder.here(), pid=os.getppid())) | {"started": "0"} | change
    (tmp_path / "lock").write_text(json.dumps(holder))
    with NodeState(tmp_path):
        pass
    without_flock(monkeypatch, errno.ENOSYS)
    (tmp_path / "lock").write_text(json.dumps(holder))
    with NodeState(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "123", "{", '{"pid": 1}', "\x00" * 10])
def test_a_lock_file_that_says_nothing_holds_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").write_text(text)
    with NodeState(tmp_path):
        pass


# --- the update that is kept ---

MASK, BLOB = toy_mask(10), bytes(range(100))
RUN = RunDescriptor.model_validate(
    {
        "federation": "f", "run": "1" * 32, "engine": "toy", "model": "", "dtype": "float32", "fingerprint": "0" * 64,
        "tokenizer": "0" * 64, "mask": MASK.hash.hex(), "mask_bytes": 1, "mask_chunks": 1, "weights": 10,
        "stream": "mk1", "rounds": 1, "local_steps": 1, "directions": 1, "lr": 0.1, "eps": 0.1, "batch_size": 1,
        "digest_every": 1,
    }
)  # fmt: skip
HEADER = Header.of(RUN.run_id, 3, 7, MASK.hash)
PATH = KeptUpdate(Update(HEADER, 5, bytes(8), 0.5, (0.25, -1.0)))
DISPLACED = KeptUpdate(Update(HEADER, 5, bytes(8), 0.5, (), values=Values(short_hash(BLOB), len(BLOB), 3)), BLOB)


@pytest.mark.parametrize("kept", [PATH, DISPLACED], ids=["path", "values"])
def test_an_update_is_kept_until_it_is_forgotten(tmp_path: Path, kept: KeptUpdate) -> None:
    with NodeState(tmp_path) as state:
        assert state.load_update(RUN) is None
        state.keep_update(RUN, PATH)
        state.keep_update(RUN, kept)
    with NodeState(tmp_path) as state:
        assert [state.load_update(RUN), state.load_update(RUN)] == [kept, kept]
        state.forget_update()
        state.forget_update()
        assert state.load_update(RUN) is None


@pytest.mark.parametrize("other", [{"run": "2" * 32}, {"run": "1" * 8 + "2" * 24}, {"mask": "0" * 32}])
def test_an_update_of_another_run_is_dropped_without_a_word(tmp_path: Path, other: dict[str, str]) -> None:
    with NodeState(tmp_path) as state, capture_logs() as logs:
        state.keep_update(RUN, PATH)
        assert state.load_update(RUN.model_copy(update=other)) is None
        assert state.load_update(RUN) is None
    assert logs == []


def spoiled(data: bytes) -> list[bytes]:
    flipped = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in (0, 25, 40, len(data) - 1)]
    return [b"", data[:20], data[:-1], data + b"\0", *flipped, bytes(2**18), data[:24] + b"\xff" * 4 + data[28:]]


@pytest.mark.parametrize("case", range(10))
@pytest.mark.parametrize("kept", [PATH, DISPLACED], ids=["path", "values"])
def test_a_damaged_update_is_a_warning(tmp_path: Path, kept: KeptUpdate, case: int) -> None:
    file = tmp_path / "update"
    with NodeState(tmp_path) as state, capture_logs() as logs:
        state.keep_update(RUN, kept)
        file.write_bytes(spoiled(file.read_bytes())[case])
        assert state.load_update(RUN) is None
        assert not file.exists()
    assert [(line["log_level"], line["file"]) for line in logs] == [("warning", str(file))]
