"""A drill: a federation trains, faults strike it by schedule, and what happened is checked."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from meerkat_mq.chaos import judge
from meerkat_mq.chaos.observer import Observed, Observer, read_history
from meerkat_mq.chaos.plan import Plan, Strike, is_core
from meerkat_mq.chaos.stage import SERVER, Stage
from meerkat_mq.chaos.verdict import DrillResult, Struck
from meerkat_mq.errors import ConfigError, DrillFailed, MeerkatError
from meerkat_mq.observe.streams import lossy
from meerkat_mq.simulate.history import Injected

START_S = 300.0
FURTHER_ROUNDS = 10  # of a federation that goes on without us
HISTORY_FILE = "history.jsonl"
LOOK_S = 0.25

Tell = Callable[[str], None]


@dataclass
class Progress:
    """How far a drill is.

    Attributes:
        now: faults that last.
    """

    seconds: float = 0.0
    version: int = 0
    struck: int = 0
    now: list[str] = field(default_factory=list)


class Drill:
    """One run of a plan.

    Args:
        plan: what to do.
        out: an empty or new folder for everything that it leaves.
        tell: is told in a line of everything that happens.

    Attributes:
        progress: for a display.
    """

    def __init__(self, plan: Plan, out: Path, tell: Tell = lambda line: None) -> None:
        self.progress = Progress()
        self._plan = plan
        self._out = out
        self._tell = tell
        self._began = 0.0
        self._injected: list[tuple[Strike, Injected, str]] = []
        self._busy: dict[str, asyncio.Lock] = {}
        self._problems: list[tuple[str, str]] = []

    async def run(self) -> DrillResult:
        """Carry the plan out and judge what happened.

        Raises:
            MeerkatError: the drill could not be carried out.
        """
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            record = await asyncio.to_thread((self._out / HISTORY_FILE).open, "x")
        except FileExistsError:
            raise ConfigError(f"--out {self._out}", "holds an earlier drill", "name another folder") from None
        except OSError as error:
            raise ConfigError(f"--out {self._out}", f"cannot be written ({error.strerror})", "name another") from error
        self._began = asyncio.get_running_loop().time()
        with record:
            async with Stage(self._plan, self._out) as stage:
                observer = Observer(stage.observed, stage.federation, self._clock, lossy(record))
                async with self._observing(observer):
                    await self._until_training(observer)
                    await self._strike_all(stage, observer)
                    finished = await self._let_finish(stage, observer)
                    await self._stop(stage, observer.seen)
                return await asyncio.to_thread(self._judge, stage, observer.seen, finished)

    def _clock(self) -> float:
        return asyncio.get_running_loop().time() - self._began

    @asynccontextmanager
    async def _observing(self, observer: Observer) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            helpers = [tasks.create_task(work) for work in (observer.session.run(), self._look(observer))]
            yield
            for task in helpers:
                task.cancel()

    async def _look(self, observer: Observer) -> None:
        while True:
            self.progress.seconds, self.progress.version = self._clock(), observer.seen.version
            await asyncio.sleep(LOOK_S)

    async def _wait(self, condition: Callable[[], object], observer: Observer, within_s: float) -> bool:
        """Whether the condition, which only messages change, comes to hold in time."""
        try:
            async with asyncio.timeout(within_s):
                while not condition():
                    observer.news.clear()
                    await observer.news.wait()
        except TimeoutError:
            return False
        return True

    async def _until_training(self, observer: Observer) -> None:
        self._tell(f"waiting for {len(self._plan.nodes)} nodes to take part")
        nodes, seen = self._plan.nodes.keys(), observer.seen
        if not await self._wait(lambda: nodes <= seen.last_update.keys() and seen.version > 1, observer, START_S):
            missing = ", ".join(sorted(nodes - seen.last_update.keys())) or "nobody"
            problem = f"no training within {START_S:g} s; no update of {missing}, version {seen.version}"
            raise DrillFailed(f"plan {self._plan.name}", problem, f"see the logs in {self._out}")

    # --- faults ---

    async def _strike_all(self, stage: Stage, observer: Observer) -> None:
        start = self._clock()
        observer.write({"drill": "begins"})
        async with asyncio.TaskGroup() as tasks:
            for strike in self._plan.strikes:
                tasks.create_task(self._strike(strike, start + strike.at, stage, observer))
            tasks.create_task(asyncio.sleep(self._plan.file.duration_s))

    async def _strike(self, strike: Strike, at: float, stage: Stage, observer: Observer) -> None:
        await asyncio.sleep(max(0.0, at - self._clock()))
        label = f"{strike.fault.name} on {strike.shown}"
        async with self._busy.setdefault("core" if is_core(strike.target) else strike.target, asyncio.Lock()):
            if self._over(observer.seen):
                self._problems.append((label, "did not strike, since the run had finished"))
                return
            began, problem = self._clock(), ""
            self._tell(f"{label}, for {strike.for_s:g} s")
            observer.write({"fault": strike.fault.name, "target": strike.shown})
            self.progress.now.append(label)
            try:
                random = Random(strike.random)  # noqa: S311 - a drill that can be repeated
                async with strike.fault.strike(stage, strike.target, random):
                    await asyncio.sleep(strike.for_s)
            except MeerkatError as error:
                problem = str(error)
            failures = _taken(stage, strike.target)
            problem = problem or failures
            if problem:
                self._problems.append((label, problem))
            ended = self._clock()
            self.progress.now.remove(label)
            self.progress.struck += 1
            observer.write({"healed": strike.fault.name, "target": strike.shown})
            self._injected.append((strike, Injected(strike.fault.name, strike.shown, began, ended), problem))

    # --- the end ---

    def _over(self, seen: Observed) -> bool:
        return seen.run is not None and seen.version >= seen.run.count

    async def _let_finish(self, stage: Stage, observer: Observer) -> bool:
        """Whether, all faults healed, the run comes to its end; one that goes on without us, some rounds further."""
        stage.set_pace(0.0)
        seen, healed = observer.seen, observer.seen.version
        self._tell("all faults have healed; the run goes on to its end")
        started = self._plan.server is not None
        goal = seen.run.count if started and seen.run is not None else healed + FURTHER_ROUNDS
        while seen.version < goal:
            version = seen.version
            if not await self._wait(lambda: seen.version > version, observer, self._plan.file.recover_s):  # noqa: B023
                return False
        if not started:
            return await self._wait(lambda: not self._absent(seen, healed), observer, self._plan.file.return_s)
        finished = await self._wait(lambda: seen.state and seen.state.status == "finished", observer, START_S)
        arrived = self._wait(lambda: not self._behind(seen, goal), observer, self._plan.file.return_s)
        return await arrived and finished

    def _absent(self, seen: Observed, version: int) -> list[str]:
        """Nodes that have not taken part since a version."""
        return [node for node in self._plan.nodes if seen.last_update[node][0] < version]

    def _behind(self, seen: Observed, version: int) -> list[str]:
        """Nodes that have not said that they reached a version."""
        return [node for node in self._plan.nodes if node not in seen.statuses or seen.statuses[node].version < version]

    async def _stop(self, stage: Stage, seen: Observed) -> None:
        """Stop what was started, the server first: it is told where the nodes stand."""
        nodes = [service for name, service in stage.services.items() if name != SERVER]
        for services in ([stage.services[SERVER]] if stage.services else [], nodes):
            ends = await asyncio.gather(*(service.stop() for service in services), return_exceptions=True)
            self._problems += [(error.where, error.problem) for error in ends if isinstance(error, DrillFailed)]
        late = [(f"link of {name}", _taken(stage, name)) for name in stage.links]
        self._problems += [(where, problem) for where, problem in late if problem]
        if not self._injected:
            self._problems.append((f"plan {self._plan.name}", "no fault struck, so nothing is proven"))

    def _judge(self, stage: Stage, seen: Observed, finished: bool) -> DrillResult:
        faults = [found for _, found, _ in self._injected]
        history = read_history(seen, stage.state_dir, faults, finished=finished)
        if self._plan.server is None and finished:
            history.settings = history.settings.model_copy(update={"count": len(history.entries)})
        happened = [
            (strike, Struck(one.name, one.target, one.began, one.ended, judge.recovery_s(one, faults, seen), problem))
            for strike, one, problem in sorted(self._injected, key=lambda injected: injected[1].began)
        ]
        checks = judge.all_checks(self._plan, stage, seen, history, happened=happened, problems=self._problems)
        first = min((found.began for found in faults), default=0.0)
        return DrillResult(
            plan=self._plan.name,
            seed=self._plan.file.seed,
            nodes=len(self._plan.nodes),
            seconds=max([first, *seen.closed.values()]),
            rounds=len(history.entries),
            closed=[(time, version) for version, time in sorted(seen.closed.items())],
            dropped=seen.dropped,
            strikes=[struck for _, struck in happened],
            checks=checks,
        )


def _taken(stage: Stage, name: str) -> str:
    """What a fault raised on this link since the last look, in words; the empty text where nothing was."""
    link = stage.links.get(name)
    if link is None or not link.failures:
        return ""
    first, count = link.failures[0], len(link.failures)
    link.failures.clear()
    return f"raised {type(first).__name__}: {first}" + (f" ({count} times)" if count > 1 else "")
