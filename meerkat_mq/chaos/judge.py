"""What must hold of a drill, beside what must hold of every history."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from meerkat_mq.chaos.faults.packets import Poison
from meerkat_mq.chaos.observer import Observed
from meerkat_mq.chaos.plan import LINK, Plan, Strike, is_core
from meerkat_mq.chaos.stage import Stage
from meerkat_mq.chaos.verdict import Struck
from meerkat_mq.errors import MeerkatError
from meerkat_mq.ledger.folder import verify_folder
from meerkat_mq.rounds.records import Verdict as Guarded
from meerkat_mq.simulate.checkers import Violation, check
from meerkat_mq.simulate.history import History

FLAGGED_WITHIN = 20

Found = Iterator[tuple[str, str]]


def all_checks(
    plan: Plan,
    stage: Stage,
    seen: Observed,
    history: History,
    *,
    happened: Sequence[tuple[Strike, Struck]],
    problems: Sequence[tuple[str, str]],
) -> dict[str, list[Violation]]:
    """What every checker found, those of histories first; blocks.

    Args:
        happened: what was planned, and what came of it.
        problems: what went wrong in the drill itself: (where, problem).
    """
    of_drill = {
        "faults strike and heal as planned": iter(problems),
        "the next round closes after each fault": recovers(plan, [struck for _, struck in happened]),
        "no process dies unasked": ends_in_words(stage),
        "every node ends at the ledger's theta": _arrives(plan, seen, history),
        "poison is refused": refused(happened, seen, history, plan.file.recover_s),
        "the ledger verifies": _verifies(stage),
    }
    return check(history) | {
        name: [Violation(name, where, problem) for where, problem in found] for name, found in of_drill.items()
    }


def recovery_s(fault: Struck, faults: Sequence[Struck], seen: Observed) -> float | None:
    """From the healing of a fault, and of those of broker and server that lasted then, to the next committed round."""
    healed = fault.ended
    for other in sorted(faults, key=lambda one: one.began):
        if is_core(other.target.removeprefix(LINK)) and other.began <= healed < other.ended:
            healed = other.ended
    times = sorted(seen.closed.values())
    after = bisect_right(times, healed)
    return times[after] - healed if after < len(times) else None


def recovers(plan: Plan, strikes: Sequence[Struck]) -> Found:
    """Within `recover_s` of each fault a round closes."""
    for struck in strikes:
        where = f"{struck.fault} on {struck.target}"
        if struck.recovery_s is None:
            yield where, f"no round closed after it had healed at {struck.ended:.1f} s"
        elif struck.recovery_s > plan.file.recover_s:
            yield where, f"the next round closed {struck.recovery_s:.1f} s after it had healed"


def ends_in_words(stage: Stage) -> Found:
    """Nothing died unasked, no log holds a traceback."""
    for service in stage.everybody:
        for end in service.deaths:
            yield service.name, f"ended with code {end.code} and said: {end.words or 'nothing'}"
        if count := service.tracebacks():
            yield service.name, f"its log holds {count} tracebacks"


def _arrives(plan: Plan, seen: Observed, history: History) -> Found:
    if plan.server is None:
        return
    last = len(history.entries)
    digest = history.entries[-1].digest.hex() if history.entries else ""
    for node in plan.nodes:
        status = seen.statuses.get(node)
        if status is None:
            yield node, "never said where it stands"
        elif (status.version, status.digest) != (last, digest):
            yield node, f"ends at version {status.version} with digest {status.digest}, not at {last} with {digest}"


def refused(happened: Sequence[tuple[Strike, Struck]], seen: Observed, history: History, recover_s: float) -> Found:
    """A poisoned node's updates come, and are refused: at the latest the twentieth."""
    for strike, struck in happened:
        poison = strike.fault
        if not isinstance(poison, Poison) or struck.problem:
            continue
        bases = {
            update.header.version
            for time, node, update in seen.updates
            if node == strike.target and struck.began <= time <= struck.ended
        }
        verdicts = [
            record.verdict
            for records in history.records
            for record in records
            if record.version in bases and record.node == strike.target and poison.may_be(record.scalars)
        ]
        verdicts = verdicts[:FLAGGED_WITHIN]
        if not verdicts and not _held_up(strike, struck, happened, recover_s):
            yield strike.target, f"no poisoned update ({poison.how}) reached the server"
        enough = len(verdicts) == FLAGGED_WITHIN or poison.how != "flip"
        if verdicts and enough and all(verdict is Guarded.ACCEPTED for verdict in verdicts):
            yield strike.target, f"{len(verdicts)} poisoned updates ({poison.how}) were all accepted"


def _held_up(strike: Strike, struck: Struck, happened: Sequence[tuple[Strike, Struck]], recover_s: float) -> bool:
    """Whether another fault, of the node or of what everybody depends on, may have kept its updates back."""
    return any(
        not isinstance(other.fault, Poison)
        and (is_core(other.target) or other.target == strike.target)
        and found.began < struck.ended
        and struck.began < found.ended + recover_s
        for other, found in happened
    )


def _verifies(stage: Stage) -> Found:
    try:
        verify_folder(stage.state_dir)
    except MeerkatError as error:
        yield str(error.where), error.problem
