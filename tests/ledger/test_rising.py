import math
import random

import pytest

from meerkat_mq.ledger.losses import RisingLoss


def first_warning(losses: list[float]) -> int | None:
    rising = RisingLoss()
    return next((number for number, loss in enumerate(losses) if rising.closed(number, loss)), None)


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_rise(seed: int) -> None:
    noise = random.Random(seed)
    assert first_warning([math.exp(-number / 300) * noise.gauss(1, 0.15) for number in range(1000)]) is None


def test_a_run_that_diverges_is_warned_of_at_once_and_once() -> None:
    found = first_warning([1.0, 1.1, 1.0, *(1.0 + 0.2 * number for number in range(40))])
    assert found is not None
    assert found < 15
    assert first_warning([1.0, 4.0, 9.0, 12.0, *[12.0] * 10]) is not None  # it diverges from its first round on
    rising = RisingLoss()
    said = [rising.closed(number, 1.0 if number < 3 else 5.0) for number in range(30)]
    assert [text for text in said if text] == ["the loss rises: 5 in round 10, 1 at the start; lower rounds.lr"]
    assert rising.warning == said[10]


def test_a_loss_that_is_not_finite_is_warned_of_at_once() -> None:
    assert first_warning([1.0, math.nan]) == 1
    assert RisingLoss().evaluated(5, math.inf) == "the held-out loss after 5 rounds is not finite; lower rounds.lr"


def test_held_out_loss_against_the_bases() -> None:
    rising = RisingLoss()
    assert [rising.evaluated(version, loss) for version, loss in ((0, 1.0), (10, 1.15), (20, 0.9))] == ["", "", ""]
    assert rising.evaluated(30, 1.3) == "the held-out loss rises: 1.3 after 30 rounds, 1 before; lower rounds.lr"
    assert RisingLoss().evaluated(30, 9.0) == ""  # the base's is not known
