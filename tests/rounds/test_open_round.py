"""The open round's frame: whatever stands in it, it fits a message."""

from dataclasses import replace

import pytest

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.core.path import Coefficient, Displacement, Entry
from meerkat_mq.rounds.early_stopping import EarlyStopping
from meerkat_mq.rounds.open_round import PAIRS, OpenRound, round_frame
from meerkat_mq.rounds.policy import NEWEST_ENTRY_BYTES, newest_that_fit
from meerkat_mq.rounds.records import Judgement
from meerkat_mq.wire.frames import MAX_FRAME_BYTES, MAX_SLOTS, Round, decode, encode, entry_bytes
from tests.rounds.support import header, settings

VERSION = 9
OLDEST = 3
TERMS = tuple(Coefficient(0, 0, 0.5, 1) for _ in range(1632))
NEWEST = Entry(VERSION - 1, TERMS, bytes(16), bytes(16), Displacement(bytes(16), 1))


def frame(
    acknowledged: dict[int, int], *, stopped: int = 0, slots: int = MAX_SLOTS, frame_bytes: int = MAX_FRAME_BYTES
) -> Round:
    """The round of version 9, which asks every slot there can be, as many of them as `stopped` for fewer steps."""
    config = EarlyStoppingConfig(by="random", every=100)
    rules = settings(mode="buffered", max_staleness=OLDEST, steps=5, early_stopping=config, frame_bytes=frame_bytes)
    early = EarlyStopping(rules, [Judgement(0, f"n{slot}", 0.0, 0.0, True) for slot in range(stopped)])
    asked = {f"n{slot}": slot for slot in range(slots)}
    current = OpenRound(VERSION, asked, 1, {}, ())
    entries = newest_that_fit((NEWEST,))
    return round_frame(header(VERSION), rules, early, current, acknowledged=acknowledged, entries=entries)


@pytest.mark.parametrize("stopped", [0, 5000, PAIRS])
def test_a_round_fits_a_message_however_many_were_heard(stopped: int) -> None:
    assert NEWEST_ENTRY_BYTES - 10 < entry_bytes(NEWEST) <= NEWEST_ENTRY_BYTES
    # ages 0, which is heard, to 4, which is too old
    made = frame({slot: VERSION - (7 * slot + 3) % 5 for slot in range(MAX_SLOTS)}, stopped=stopped)
    assert decode(encode(made)) == made
    assert (len(made.asked), len(made.short), made.entries) == (MAX_SLOTS, stopped, (NEWEST,))
    assert len(made.heard) == MAX_SLOTS // 5
    assert len(made.heard_before) == PAIRS - stopped


def test_those_heard_last_are_listed_and_of_one_age_the_lowest_slots() -> None:
    ages = {slot: 3 if slot < 100 else 1 if slot % 5 == 0 else 2 for slot in range(MAX_SLOTS)}
    listed = dict(frame({slot: VERSION - age for slot, age in ages.items()}).heard_before)
    newest = {slot for slot, age in ages.items() if age == 1}
    others = [slot for slot, age in ages.items() if age == 2][: PAIRS - len(newest)]
    assert others
    assert listed == {slot: ages[slot] for slot in newest.union(others)}
    assert list(listed) == sorted(listed)


def test_where_all_have_room_all_are_listed() -> None:
    found = frame({slot: VERSION - 1 - slot % 4 for slot in range(16)}).heard_before
    assert found == tuple((slot, 1 + slot % 4) for slot in range(16) if slot % 4 < 3)


@pytest.mark.parametrize("frame_bytes", [1100, 4096, 16_000, 16_500, 17_500, 20_000, 40_000])
def test_on_a_broker_with_small_packets_a_round_says_less(frame_bytes: int) -> None:
    made = frame(dict.fromkeys(range(800), VERSION - 1), stopped=100, slots=1600, frame_bytes=frame_bytes)
    assert len(encode(made)) <= frame_bytes
    assert decode(encode(made)) == made
    assert (len(made.asked), len(made.short)) == (1600, 100)
    bare = len(encode(replace(made, entries=(), heard_before=())))
    left = frame_bytes - bare - entry_bytes(NEWEST)
    assert bool(made.entries) == (left >= 0)
    assert len(made.heard_before) == min(800, max(0, (left if made.entries else frame_bytes - bare) - 2) // 4)
