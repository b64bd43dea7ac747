"""What runtime/model.py's NodeStore promises, of both: a state folder, and what a node of a world keeps."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import pytest
from structlog.testing import capture_logs

from meerkat_mq.node.state import NodeState
from meerkat_mq.runtime.model import KeptUpdate, NodeStore
from meerkat_mq.wire.messages import Header, Update
from meerkat_mq.worlds.node import MemoryNodeStore
from tests.runtime.one_server import MASK, ONE, OTHER_MASK, TWO


class Stepping(NodeStore, Protocol):
    """A store, with what a model asks of it."""

    def take_steps(self, run: str, count: int) -> int: ...


Start = Callable[[], AbstractContextManager[Stepping]]


@pytest.fixture(params=["folder", "memory"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """Starts a process of one node."""
    memory = MemoryNodeStore()
    with capture_logs():
        yield (lambda: NodeState(tmp_path)) if request.param == "folder" else (lambda: nullcontext(memory))


def update(version: int = 0) -> KeptUpdate:
    return KeptUpdate(Update(Header.of(ONE.run_id, 1, version, ONE.mask_hash), 7, bytes(8), 0.5, (0.25,)))


def test_whether_a_node_has_taken_part(start: Start) -> None:
    with start() as store:
        store.keep_mask(MASK)
        store.keep_update(ONE, update())
        assert not store.has_taken_part()
        store.take_steps(ONE.run, 1)
        assert store.has_taken_part()
    with start() as store:
        assert store.has_taken_part()


def test_one_mask_and_one_update_are_kept(start: Start) -> None:
    with start() as store:
        assert store.load_mask(MASK.hash) is None
        store.keep_mask(OTHER_MASK)
        store.keep_mask(MASK)
        store.keep_update(ONE, update())
        store.keep_update(ONE, update(1))
    with start() as store:
        assert store.load_mask(OTHER_MASK.hash) is None
        kept = store.load_mask(MASK.hash)
        assert kept is not None
        assert kept.hash == MASK.hash
        assert store.load_update(ONE) == update(1)
        store.forget_update()
        assert store.load_update(ONE) is None
        store.keep_update(ONE, update())
        assert store.load_update(TWO) is None


def test_steps_go_on_in_a_run(start: Start) -> None:
    with start() as store:
        assert [store.take_steps(ONE.run, 3), store.take_steps(ONE.run, 2)] == [0, 3]
    with start() as store:
        assert [store.take_steps(ONE.run, 1), store.take_steps(TWO.run, 1)] == [5, 0]


def test_directions_of_a_day_are_counted_over_runs_and_starts_and_refused_at_the_limit(start: Start) -> None:
    with start() as store:
        assert store.spend(ONE.run, 2.0, 1.0, 10.0)
        assert store.spend(ONE.run, 2.0, 1.0, 10.0)
        assert not store.spend(ONE.run, 2.0, 6.5, 10.0)
    with start() as store:
        assert store.spend(ONE.run, 2.0, 3.0, 10.0)  # what was refused was not counted
        assert not store.spend(TWO.run, 2.0, 2.0, 10.0)
        assert store.spend(TWO.run, 2.0, 1.0, 10.0)
