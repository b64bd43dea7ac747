from meerkat_mq.rounds.presence import Pulse


def test_after_some_rounds_or_a_while_but_never_soon_again() -> None:
    pulse = Pulse(rounds=10, slow_s=300.0)
    pulse.said(0, 100.0)
    assert not pulse.due(1_000, 104.9)
    assert pulse.due(10, 105.0)
    assert not pulse.due(9, 399.0)
    assert pulse.due(1, 400.0)
    assert not pulse.due(0, 1e9)  # nothing new
    pulse.said(50, 400.0)
    assert pulse.due(3, 406.0)  # a ledger restored from backup
