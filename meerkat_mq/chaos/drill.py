"""A drill: a federation trains, faults strike it by schedule, and what happened is checked."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TextIO

from meerkat_mq.chaos import judge
from meerkat_mq.chaos.observer import Observed, Observer, read_history
from meerkat_mq.chaos.plan import Plan, Strike, is_core
from meerkat_mq.chaos.stage import SERVER, Stage
from meerkat_mq.chaos.verdict import DrillResult, Struck
from meerkat_mq.core.files import writing
from meerkat_mq.errors import ConfigError, DrillFailed, MeerkatError
from meerkat_mq.observe.streams import lossy

START_S = 300.0
FURTHER_ROUNDS = 10  # of a federation that goes on without us
HISTORY_FILE = "history.jsonl"


def new_file(out: Path, name: str) -> TextIO:
    """Open a file for what a drill leaves; ConfigError where it holds an earlier drill, or cannot be written."""
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        if (out / name).exists():
            raise ConfigError(f"--out {out}", "holds an earlier drill", "name another folder")
        return (out / name).open("x", encoding="utf-8")


class Drill:
    """One run of a plan.

    Args:
        plan: what to do.
        out: an empty or new folder for everything that it leaves.
        tell: is told in a line of everything that happens.

    Attributes:
        seen: what an observer saw on the broker so far.
        happened: the faults that came and went; `now`: those that last.
    """

    def __init__(self, plan: Plan, out: Path, tell: Callable[[str], None] = lambda line: None) -> None:
        self.seen = Observed()
        self.now: list[str] = []
        self._plan = plan
        self._out = out
        self._tell = tell
        self._began = 0.0
        self.happened: list[tuple[Strike, Struck]] = []
        self._busy: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._problems: list[tuple[str, str]] = []

    def clock(self) -> float:
        """Seconds since the drill began."""
        return asyncio.get_running_loop().time() - self._began

    async def run(self) -> DrillResult:
        """Carry the plan out and judge what happened; MeerkatError where it could not be carried out."""
        with new_file(self._out, HISTORY_FILE) as record:
            self._began = asyncio.get_running_loop().time()
            async with Stage(self._plan, self._out) as stage, asyncio.TaskGroup() as tasks:
                observer = Observer(stage.observed, stage.federation, self.clock, lossy(record), self.seen)
                session = tasks.create_task(observer.session.run())
                await self._until_training(observer)
                await self._strike_all(stage, observer)
                finished = await self._let_finish(stage, observer)
                await self._stop(stage)
                session.cancel()
            return await asyncio.to_thread(self._judge, stage, finished)

    async def _until_training(self, observer: Observer) -> None:
        self._tell(f"waiting for {len(self._plan.nodes)} nodes to take part")
        nodes, seen = self._plan.nodes.keys(), self.seen
        if not await observer.sees(lambda: nodes <= seen.last_update.keys() and seen.version > 1, START_S):
            missing = ", ".join(sorted(nodes - seen.last_update.keys())) or "nobody"
            problem = f"no training within {START_S:g} s; no update of {missing}, version {seen.version}"
            raise DrillFailed(f"plan {self._plan.name}", problem, f"see the logs in {self._out}")

    # --- faults ---

    async def _strike_all(self, stage: Stage, observer: Observer) -> None:
        start = self.clock()
        observer.write({"drill": "begins"})
        async with asyncio.TaskGroup() as tasks:
            for strike in self._plan.strikes:
                tasks.create_task(self._strike(strike, start + strike.at, stage, observer))
            tasks.create_task(asyncio.sleep(self._plan.file.duration_s))

    async def _strike(self, strike: Strike, at: float, stage: Stage, observer: Observer) -> None:
        await asyncio.sleep(max(0.0, at - self.clock()))
        name, target, label = strike.fault.name, strike.shown, f"{strike.fault.name} on {strike.shown}"
        async with self._busy["core" if is_core(strike.target) else strike.target]:
            if self.seen.run is not None and self.seen.version >= self.seen.run.count:
                self._problems.append((label, "did not strike, since the run had finished"))
                return
            began, problem = self.clock(), ""
            self._tell(f"{label}, for {strike.for_s:g} s")
            observer.write({"fault": name, "target": target})
            self.now.append(label)
            try:
                random = Random(strike.random)  # noqa: S311 - a drill that can be repeated
                async with strike.fault.strike(stage, strike.target, random):
                    await asyncio.sleep(strike.for_s)
            except MeerkatError as error:
                problem = str(error)
            problem = problem or stage.raised(strike.target)
            if problem:
                self._problems.append((label, problem))
            self.happened.append((strike, Struck(name, target, began, self.clock(), problem=problem)))
            self.now.remove(label)
            observer.write({"healed": name, "target": target})

    # --- the end ---

    async def _let_finish(self, stage: Stage, observer: Observer) -> bool:
        """Whether, all faults healed, the run comes to its end; one that goes on without us, some rounds further."""
        stage.set_pace(0.0)
        seen, healed, return_s = self.seen, self.seen.version, self._plan.file.return_s
        self._tell("all faults have healed; the run goes on to its end")
        started = self._plan.server is not None
        goal = seen.run.count if started and seen.run is not None else healed + FURTHER_ROUNDS
        while (version := seen.version) < goal:
            if not await observer.sees(lambda: seen.version > version, self._plan.file.recover_s):
                return False
        if not started:
            return await observer.sees(
                lambda: all(seen.last_update[node][0] >= healed for node in self._plan.nodes), return_s
            )
        finished = await observer.sees(lambda: seen.state and seen.state.status == "finished", START_S)
        arrived = await observer.sees(
            lambda: all(node in seen.statuses and seen.statuses[node].version >= goal for node in self._plan.nodes),
            return_s,
        )
        return arrived and finished

    async def _stop(self, stage: Stage) -> None:
        """Stop what was started, the server first: it is told where the nodes stand."""
        nodes = [service for name, service in stage.services.items() if name != SERVER]
        for services in ([stage.services[SERVER]] if stage.services else [], nodes):
            ends = await asyncio.gather(*(service.stop() for service in services), return_exceptions=True)
            self._problems += [(error.where, error.problem) for error in ends if isinstance(error, DrillFailed)]
        late = [(f"link of {name}", stage.raised(name)) for name in stage.links]
        self._problems += [(where, problem) for where, problem in late if problem]
        if not self.happened:
            self._problems.append((f"plan {self._plan.name}", "no fault struck, so nothing is proven"))

    def _judge(self, stage: Stage, finished: bool) -> DrillResult:
        self.happened.sort(key=lambda one: one[1].began)
        struck = [found for _, found in self.happened]
        struck = [replace(one, recovery_s=judge.recovery_s(one, struck, self.seen)) for one in struck]
        happened = [(strike, one) for (strike, _), one in zip(self.happened, struck, strict=True)]
        history = read_history(self.seen, stage.state_dir, [one.injected for one in struck], finished=finished)
        if self._plan.server is None and finished:
            history.settings = history.settings.model_copy(update={"count": len(history.entries)})
        return DrillResult(
            plan=self._plan.name,
            seed=self._plan.file.seed,
            nodes=len(self._plan.nodes),
            seconds=max([struck[0].began if struck else 0.0, *self.seen.closed.values()]),
            rounds=len(history.entries),
            closed=[(time, version) for version, time in sorted(self.seen.closed.items())],
            dropped=self.seen.dropped,
            strikes=struck,
            checks=judge.all_checks(self._plan, stage, self.seen, history, happened=happened, problems=self._problems),
        )
