"""Whom a round waits for: the right nodes, and an update costs no look at all of them."""

import math
import sys
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.roster import Awaited
from tests.rounds.support import AnsweredServer, answered_server, status

names = st.sampled_from("abcd")
moves = st.one_of(
    st.tuples(st.just("add"), names, st.integers(1, 9) | st.just(math.inf)),
    st.tuples(st.just("until"), names, st.integers(0, 9) | st.just(math.inf)),
    st.tuples(st.just("discard"), names),
    st.tuples(st.just("pass"), st.integers(0, 3)),
)


@given(st.lists(moves, max_size=40))
def test_it_knows_what_a_look_at_all_of_them_would_show(moves: list[Any]) -> None:
    awaited, known, now = Awaited("ab"), dict.fromkeys("ab", math.inf), 0.0
    for move in moves:
        match move:
            case ("add", name, ahead) if name not in known:
                known[name] = now + ahead
                awaited.add(name, now + ahead)
            case ("until", name, ahead):
                known |= {name: now + ahead} if name in known else {}
                awaited.until(name, now + ahead)
            case ("discard", name):
                known.pop(name, None)
                awaited.discard(name)
            case ("pass", seconds):
                now += seconds
        assert awaited.all_dead(now) == all(dead_at <= now for dead_at in known.values())
        assert awaited.next_death == min([at for at in known.values() if at > now], default=math.inf)
        assert len(awaited) == len(known)


class Work:
    """Counts the bytecode instructions that run inside it."""

    def __enter__(self) -> "Work":
        self.done = 0
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        frame.f_trace_opcodes = True
        self.done += event == "opcode"
        return self._trace


def crowd(offline: int, word: str) -> AnsweredServer:
    """A server with two nodes online, one of which is to answer, and so many that went offline."""
    server = answered_server(min_nodes=1, quorum=1.0, grace_s=1000.0)
    for at in range(offline):
        server.born(0.0, f"gone {at}")
        wakes_in_s = 3600 if word == "asleep" else None
        server.give(e.StatusCame(0.0, f"gone {at}", status(word, wakes_in_s=wakes_in_s)))
    server.born(1.0, "a", "b")
    server.tick(1500.0)  # the grace of the offline ones is over: the round goes on with those at hand
    return server


@pytest.mark.parametrize("word", ["lost", "asleep"])
def test_an_update_costs_the_same_however_many_nodes_are_offline(word: str) -> None:
    work = []
    for offline in (10, 1000):
        server = crowd(offline, word)
        with Work() as counted:
            server.update(1501.0, "a")
            assert server.machine.wake_at is not None
        work.append(counted.done)
    assert work[0] > 100
    assert work[1] < 1.2 * work[0]
