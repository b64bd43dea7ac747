"""Steps with waiting in between: what they are sent, what is thrown into them, and what giving them up means."""

from collections.abc import Callable

import pytest

from meerkat_mq.runtime.ports import Failed
from meerkat_mq.runtime.steps import Done, Sequence, Steps, until, work
from tests.runtime.ports import VirtualClock, Worker


class Waiting:
    """Things that are waited for, by name; a test ends them."""

    def __init__(self) -> None:
        self.begun: dict[str, tuple[Done, Failed]] = {}

    def wait(self, name: str) -> Steps[object]:
        def begin(done: Done, failed: Failed) -> None:
            self.begun[name] = done, failed

        result: object = yield begin
        return result

    def end(self, name: str, result: object) -> None:
        self.begun[name][0](result)

    def fail(self, name: str, error: Exception) -> None:
        self.begun[name][1](error)


@pytest.fixture
def waiting() -> Waiting:
    return Waiting()


def both(waiting: Waiting, log: list[object]) -> Steps[str]:
    """Two waits, one after the other."""
    try:
        log.append((yield from waiting.wait("first")))
        log.append((yield from waiting.wait("second")))
    finally:
        log.append("left")
    return "whole"


def test_each_result_is_sent_and_the_end_is_told_once(waiting: Waiting) -> None:
    log, found = list[object](), list[str]()
    Sequence(both(waiting, log), found.append)
    assert (list(waiting.begun), log) == (["first"], [])
    waiting.end("first", 1)
    assert (list(waiting.begun), log, found) == (["first", "second"], [1], [])
    waiting.end("second", 2)
    assert (log, found) == ([1, 2, "left"], ["whole"])


def test_what_ended_already_ends_nothing_else(waiting: Waiting) -> None:
    log, found = list[object](), list[str]()
    Sequence(both(waiting, log), found.append)
    waiting.end("first", 1)
    waiting.end("first", 7)
    waiting.fail("first", OSError("late"))
    assert (log, found) == ([1], [])
    waiting.end("second", 2)
    waiting.end("second", 3)
    assert (log, found) == ([1, 2, "left"], ["whole"])


def test_a_failure_is_thrown_where_it_is_waited_for(waiting: Waiting) -> None:
    def steps() -> Steps[str]:
        try:
            yield from waiting.wait("first")
        except OSError as error:
            return f"instead: {error}"
        return "never"

    found: list[str] = []
    Sequence(steps(), found.append)
    waiting.fail("first", OSError("no disk"))
    assert found == ["instead: no disk"]


def test_a_failure_that_nobody_takes_leaves_through_whoever_brought_it(waiting: Waiting) -> None:
    log, found = list[object](), list[str]()
    Sequence(both(waiting, log), found.append)
    with pytest.raises(OSError, match="no disk"):
        waiting.fail("first", OSError("no disk"))
    assert (log, found) == (["left"], [])
    waiting.end("first", 1)
    assert (log, found) == (["left"], [])


def test_who_gives_up_runs_what_must_be_done_and_ignores_what_still_comes(waiting: Waiting) -> None:
    log, found = list[object](), list[str]()
    sequence = Sequence(both(waiting, log), found.append)
    sequence.cancel()
    assert (log, found) == (["left"], [])
    waiting.end("first", 1)
    waiting.fail("first", OSError("late"))
    sequence.cancel()
    assert (log, found, list(waiting.begun)) == (["left"], [], ["first"])


def test_who_gives_up_what_is_just_running_has_it_end_where_it_would_wait_next(waiting: Waiting) -> None:
    def gives_up() -> Steps[str]:
        try:
            yield from waiting.wait("first")
            sequence.cancel()
            log.append("still here")
            yield from waiting.wait("second")
        finally:
            log.append("left")
        return "never"

    log, found = list[object](), list[str]()
    sequence = Sequence(gives_up(), found.append)
    waiting.end("first", 1)
    assert (list(waiting.begun), log, found) == (["first"], ["still here", "left"], [])


def test_who_gives_up_what_is_just_ending_is_told_nothing(waiting: Waiting) -> None:
    def gives_up() -> Steps[str]:
        yield from waiting.wait("first")
        sequence.cancel()
        return "never"

    found = list[str]()
    sequence = Sequence(gives_up(), found.append)
    waiting.end("first", 1)
    assert found == []


def test_an_answer_that_is_there_at_once_goes_on_at_once() -> None:
    def at_once(result: object) -> Callable[[Done, Failed], None]:
        return lambda done, failed: done(result)

    def refused(done: Done, failed: Failed) -> None:
        failed(OSError("no disk"))

    def steps() -> Steps[list[object]]:
        found = list[object]()
        for number in range(3):
            found.append((yield at_once(number)))
        try:
            yield refused
        except OSError as error:
            found.append(str(error))
        return found

    ends: list[list[object]] = []
    Sequence(steps(), ends.append)
    assert ends == [[0, 1, 2, "no disk"]]


def test_steps_without_any_waiting_end_at_once() -> None:
    def steps() -> Steps[int]:
        return 3
        yield

    found: list[int] = []
    Sequence(steps(), found.append).cancel()
    assert found == [3]


def test_work_brings_what_a_job_returns_and_raises() -> None:
    def halve(number: int) -> int:
        if number % 2:
            raise ValueError(number)
        return number // 2

    def steps(number: int) -> Steps[int]:
        try:
            return (yield from work(worker, halve, number))
        except ValueError:
            return -1

    found: list[int] = []
    clock = VirtualClock()
    worker = Worker(clock)
    Sequence(steps(8), found.append)
    Sequence(steps(7), found.append)
    assert found == []
    clock.settle()
    assert found == [4, -1]


def test_work_that_is_given_up_before_it_begins_is_not_done() -> None:
    clock = VirtualClock()
    worker, done = Worker(clock), list[int]()
    worker.held = True
    for number in range(3):
        steps = Sequence(work(worker, done.append, number))
        if number < 2:
            steps.cancel()
    worker.free()
    assert done == [2]


def test_a_time_is_waited_for_and_one_that_is_past_does_not_come_before_the_call_is_over() -> None:
    def steps() -> Steps[float]:
        yield from until(clock, 2.5)
        yield from until(clock, 1.0)
        return clock.now()

    found: list[float] = []
    clock = VirtualClock()
    Sequence(steps(), found.append)
    clock.go(2.4)
    assert found == []
    clock.go(0.2)
    assert found == [2.5]

    Sequence(until(clock, 0.0), lambda _: found.append(-1.0))
    assert found == [2.5]
    clock.settle()
    assert found == [2.5, -1.0]
