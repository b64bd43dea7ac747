"""Run one schedule, and judge it."""

from meerkat_mq.errors import AnotherServer, LedgerError
from meerkat_mq.simulate.checkers import Violation, check
from meerkat_mq.simulate.faults import inflict, leave_behind
from meerkat_mq.simulate.federation import Federation
from meerkat_mq.simulate.history import History
from meerkat_mq.simulate.node import AWAKE_S
from meerkat_mq.simulate.schedule import Schedule
from meerkat_mq.worlds.quiet import quiet

LAST_WORDS_S = 1.0
NO_FAILURE = "no process fails"


def patience(schedule: Schedule) -> float:
    """Virtual seconds within which a healed federation finishes, whatever it went through."""
    a_round = 2.0 + 2.0 * schedule.measure_s + (3.0 * schedule.settings.deadline_s if schedule.slow else 0.0)
    a_round += 1.5 * schedule.step_s * schedule.spread + (schedule.every_s + AWAKE_S if schedule.sleepers else 0.0)
    return 30.0 + 12 * schedule.settings.deadline_s + a_round * schedule.settings.count


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
    return history, ended + [violation for found in check(history).values() for violation in found]
