"""What a closed round comes to: the guards' verdicts, judgements of nodes, the entry's coefficients and shares.

A function of the round's committed updates and of the guards' window alone. With 1,000 nodes and 100 steps it takes a
good part of a second, so the machine has it computed for it (JudgeRound) and the event loop goes on meanwhile.
"""

from collections.abc import Sequence

from meerkat_mq.rounds.early_stopping import judgements_of, with_verdicts
from meerkat_mq.rounds.guards import Guard
from meerkat_mq.rounds.policy import RoundSettings, shares_of, terms_of
from meerkat_mq.rounds.records import RoundOutcome, UpdateRecord


def outcome_of(
    guard: Guard,
    settings: RoundSettings,
    version: int,
    records: Sequence[UpdateRecord],
    products: Sequence[Sequence[float]],
) -> RoundOutcome:
    """Judge a round; the guard remembers it. Of each round once, in order.

    Args:
        guard: as the rounds before left it; nobody else uses it meanwhile.
        settings: of the run.
        version: of the round.
        records: its committed updates, by base version and slot.
        products: ⟨g_p, z⟩ by lane and step; () where the run does not measure them.
    """
    guarded = guard.judge(records)
    judgements = judgements_of(version, guarded, products, settings)
    judged = with_verdicts(guarded, judgements)
    guard.remember(judged)
    terms, shares = terms_of(judged, settings, version), shares_of(judged, settings, version)
    return RoundOutcome(judged, judgements, terms, shares, dict(guard.flagged))
