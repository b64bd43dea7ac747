"""The ports on a real event loop: what a callback raises ends the service, and nothing is called afterwards."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from meerkat_mq.runtime.loop import LoopClock, Ports, ThreadCompute


class Loop:
    """Ports of this loop, and a log of what was called."""

    def __init__(self, worker: ThreadPoolExecutor) -> None:
        self.ports = Ports()
        self.clock = LoopClock(self.ports)
        self.compute = ThreadCompute(self.ports, worker)
        self.called: list[object] = []

    def raises(self, *_: object) -> None:
        raise OSError("in a callback")

    def at(self, action: Callable[[], None]) -> None:
        """Do it on the next turn of the loop."""
        self.clock.at(self.clock.now(), action)

    async def idle(self) -> None:
        """All that was asked for before this has had its turn: of the worker, and of the loop."""
        over = asyncio.get_running_loop().create_future()
        job_over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        other = Ports()  # its callbacks are called although the others have ended
        ThreadCompute(other, self.compute._executor).run(int, lambda _: job_over.set_result(None), self.raises)
        await job_over
        LoopClock(other).at(self.clock.now(), lambda: over.set_result(None))
        await over


@pytest.fixture
async def loop() -> AsyncIterator[Loop]:
    with ThreadPoolExecutor(1) as worker:
        yield Loop(worker)


async def test_a_job_runs_in_a_thread_and_is_answered_on_the_loop(loop: Loop) -> None:
    def job() -> int:
        threads.append(threading.current_thread())
        return 3

    def done(result: int) -> None:
        threads.append(threading.current_thread())
        loop.called.append(result)

    threads: list[threading.Thread] = []
    loop.compute.run(job, done, loop.raises)
    assert loop.called == []
    await loop.idle()
    assert loop.called == [3]
    assert threads[0] is not threading.current_thread()
    assert threads[1] is threading.current_thread()


async def test_jobs_are_done_and_answered_in_order_and_one_that_fails_says_so(loop: Loop) -> None:
    def job(number: int) -> int:
        return 6 // number

    for number in (1, 0, 2):
        loop.compute.run(lambda number=number: job(number), loop.called.append, loop.called.append)  # type: ignore[misc]
    await loop.idle()
    first, failure, last = loop.called
    assert (first, last) == (6, 3)
    assert isinstance(failure, ZeroDivisionError)


async def test_a_timer_that_is_cancelled_does_nothing(loop: Loop) -> None:
    timer = loop.clock.at(loop.clock.now(), lambda: loop.called.append("cancelled"))
    loop.at(lambda: loop.called.append("due"))
    timer.cancel()
    assert loop.called == []
    await loop.idle()
    assert loop.called == ["due"]
    timer.cancel()


async def test_what_a_timer_raises_ends_the_service_and_nothing_is_called_afterwards(loop: Loop) -> None:
    running = asyncio.create_task(loop.ports.run())
    loop.at(loop.raises)
    loop.at(lambda: loop.called.append("a timer"))
    loop.compute.run(int, loop.called.append, loop.called.append)
    with pytest.raises(OSError, match="in a callback"):
        await running
    await loop.idle()
    loop.ports.call(loop.called.append, "a message")
    assert loop.called == []


@pytest.mark.parametrize("fails", [False, True])
async def test_what_the_answer_to_a_job_raises_ends_the_service(loop: Loop, fails: bool) -> None:
    running = asyncio.create_task(loop.ports.run())
    loop.compute.run(lambda: 1 // (not fails), loop.raises, loop.raises)
    loop.compute.run(int, loop.called.append, loop.called.append)
    with pytest.raises(OSError, match="in a callback"):
        await running
    await loop.idle()
    assert loop.called == []


async def test_of_two_failures_the_first_is_raised_also_where_nobody_waited_yet(loop: Loop) -> None:
    def other() -> None:
        raise ValueError("the second")

    loop.ports.call(loop.raises)
    loop.ports.call(other)
    with pytest.raises(OSError, match="in a callback"):
        await loop.ports.run()


async def test_a_job_that_is_given_up_with_its_worker_is_not_answered(loop: Loop) -> None:
    free, over = threading.Event(), asyncio.Event()
    loop.compute.run(lambda: free.wait(10), lambda _: over.set(), loop.raises)
    loop.compute.run(int, loop.called.append, loop.called.append)
    loop.compute._executor.shutdown(wait=False, cancel_futures=True)
    free.set()
    await over.wait()
    assert loop.called == []


async def test_a_job_that_raises_stop_iteration_fails_like_any_other(loop: Loop) -> None:
    def job() -> object:
        return next(iter([]))  # in an engine of a user's own, for one

    loop.compute.run(job, loop.raises, lambda error: loop.called.append(type(error)))
    await loop.idle()
    assert loop.called == [StopIteration]


async def test_what_no_job_can_go_on_after_ends_the_service(loop: Loop) -> None:
    class Panic(BaseException):
        """As a library in Rust raises."""

    def job() -> None:
        raise Panic

    loop.compute.run(job, loop.called.append, loop.called.append)
    with pytest.raises(Panic):
        await asyncio.wait_for(loop.ports.run(), 5.0)
    assert loop.called == []
