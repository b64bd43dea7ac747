"""Run one schedule, and judge it."""

from itertools import accumulate, count

from meerkat_mq.errors import AnotherServer, LedgerError
from meerkat_mq.rounds.policy import deadline_length, needed
from meerkat_mq.rounds.server import LAST_ATTEMPT
from meerkat_mq.runtime import budgets
from meerkat_mq.runtime.blobs import PATIENCE_S
from meerkat_mq.runtime.disk import LONGEST_PAUSE_S
from meerkat_mq.runtime.succession import ANSWER_S
from meerkat_mq.runtime.writer import TERM_PAUSE_S
from meerkat_mq.simulate.checkers import Violation, check
from meerkat_mq.simulate.faults import inflict, leave_behind
from meerkat_mq.simulate.federation import RESTART_S, Federation
from meerkat_mq.simulate.history import History
from meerkat_mq.simulate.node import AWAKE_S, UNWILLING_S
from meerkat_mq.simulate.schedule import Schedule
from meerkat_mq.worlds.broker import BACK_OFF_S, KEEP_ALIVE_S
from meerkat_mq.worlds.quiet import quiet

LAST_WORDS_S = 1.0
NO_FAILURE = "no process fails"
TAKES_PART = "a node of an earlier release takes part"
# From the last fault on, everybody is found again within: a keep-alive, a back-off, a supervisor's pause, a question to
# the server before, a pause between terms, one of a full disk's, and the silences of a blob that does not come. Before
# that, nodes that forged terms may have made those wait that have seen one.
FOUND_S = KEEP_ALIVE_S + BACK_OFF_S[-1] + RESTART_S + ANSWER_S + TERM_PAUSE_S + LONGEST_PAUSE_S + 15 * PATIENCE_S
FORGED_S = budgets.LONGEST_PAUSE_S


def patience(schedule: Schedule) -> float:
    """Virtual seconds within which a federation with a live quorum finishes, after the last fault.

    A round closes at the latest with the deadline, extended as often as its slowest node needs, by which this has
    answered; then it is judged and committed. Before that, the longest extension ends, which may just have begun.
    """
    rules = schedule.settings
    answer_s = 1.5 * schedule.step_s * schedule.spread + schedule.judge_s + 6 * schedule.commit_s + 1.0
    if schedule.slow:
        answer_s = max(answer_s, rules.deadline_s + schedule.commit_s)
    answer_s += (schedule.every_s + AWAKE_S) * (schedule.sleepers > 0) + UNWILLING_S * schedule.reluctant
    closing_s = schedule.measure_s + schedule.judge_s + 6 * schedule.commit_s + 1.0
    begun_s = max(deadline_length(rules, version, LAST_ATTEMPT) for version in range(rules.count))
    forged_s = FORGED_S * ("forged terms" in schedule.kinds)
    return (
        FOUND_S
        + forged_s
        + begun_s
        + sum(_open_s(schedule, version, answer_s) + closing_s for version in range(rules.count))
    )


def _open_s(schedule: Schedule, version: int, answer_s: float) -> float:
    """How long a round waits for such answers; where too many of a sample are lost, all are asked in the extension."""
    rules = schedule.settings
    first = int(bool(schedule.lost) and rules.fraction_of(version) < 1)
    ends = accumulate(deadline_length(rules, version, attempt) for attempt in count(first))
    return first * deadline_length(rules, version, 0) + next(end for end in ends if end >= answer_s)


def play(federation: Federation) -> None:
    """Let a schedule happen: everything that it says, and what comes of it."""
    schedule, clock = federation.schedule, federation.clock
    heals_at = schedule.heals_at + 0.01
    if schedule.leftovers:
        leave_behind(federation)
    federation.start()
    for fault in schedule.faults:
        inflict(federation, fault)
    clock.at(heals_at, federation.heal)
    clock.run(heals_at)
    clock.run(heals_at + patience(schedule), lambda: federation.finished)
    clock.run(clock.now() + LAST_WORDS_S)


def judge(schedule: Schedule) -> tuple[History, list[Violation]]:
    """The history of a schedule, and what does not hold of it; an error that ends a process counts too."""
    federation = Federation(schedule)
    try:
        with quiet():
            play(federation)
    except Exception as error:
        failure = Violation(NO_FAILURE, f"{federation.clock.now():.3f} s", f"{type(error).__name__}: {error}")
        return federation.close(), [failure]
    history = federation.close()
    fine = {AnotherServer, LedgerError} if "damaged ledger" in schedule.kinds else {AnotherServer}
    ended = [Violation(NO_FAILURE, who, str(error)) for who, error in federation.errors if type(error) not in fine]
    rules = schedule.settings  # each round may close without a certain node, whose update or displacement is late then
    late = schedule.values > 0 or (rules.buffered and rules.max_staleness == 0)
    left_out = late and (rules.buffer_size if rules.buffered else needed(schedule.nodes, rules.quorum)) < schedule.nodes
    if schedule.earlier and not (left_out or "n0" in schedule.lost or history.took("n0")):
        ended.append(Violation(TAKES_PART, "node n0", f"of {schedule.earlier} has no update in the ledger"))
    return history, ended + [violation for found in check(history).values() for violation in found]
