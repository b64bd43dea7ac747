"""Lines that repeat are said less and less often, and counted."""

from typing import Any

from meerkat_mq.core.seldom import MOST_KEYS, Seldom

DAY_S = 86_400


class Log:
    """A clock that a test moves on, and the lines that were said."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lines: list[tuple[float, str, dict[str, Any]]] = []
        self.seldom = Seldom(lambda: self.now)

    def say(self, event: str, *key: object, **fields: object) -> bool:
        return self.seldom.say(self._take, event, *key, **fields)

    def _take(self, event: str, **fields: Any) -> None:
        self.lines.append((self.now, event, fields))


def test_a_day_of_the_same_line_is_some_dozens_and_none_is_uncounted() -> None:
    log = Log()
    for second in range(0, DAY_S, 2):
        log.now = float(second)
        log.say("broker unreachable", "refused", problem="refused")
    assert [moment for moment, *_ in log.lines[:5]] == [0, 2, 4, 8, 16]
    assert len(log.lines) < 50
    left_out = sum(fields.get("left_out", 0) for *_, fields in log.lines)
    silent_s = DAY_S - log.lines[-1][0]
    assert left_out + len(log.lines) + silent_s / 2 >= DAY_S / 2
    assert all(later[0] - earlier[0] <= 3602 for earlier, later in zip(log.lines, log.lines[1:], strict=False))


def test_ten_thousand_lines_a_second_are_a_handful() -> None:
    log = Log()
    for number in range(100_000):
        log.now = number / 2_500
        log.say("message dropped", "up/evil/update", "Truncated")
    assert len(log.lines) <= 6
    assert log.lines[1][2]["left_out"] >= 2_499


def test_each_topic_and_reason_has_its_first_line() -> None:
    log = Log()
    assert [log.say("dropped", topic, reason) for topic in "ab" for reason in "xy"] == [True] * 4
    assert not log.say("dropped", "a", "x")


def test_what_comes_after_a_quiet_minute_is_news() -> None:
    log = Log()
    for moment in (0, 0.5, 59, 130):
        log.now = moment
        log.say("connection lost")
    assert [(moment, fields) for moment, _, fields in log.lines] == [(0, {}), (59, {"left_out": 1}), (130, {})]


def test_a_flood_of_keys_is_bounded_and_an_old_key_still_heard() -> None:
    log = Log()
    for number in range(50_000):
        log.now += 0.002
        log.say("dropped", f"up/node-{number}/update")
        log.say("connection lost")
    said = [event for _, event, _ in log.lines]
    assert said.count("dropped") < 3 * MOST_KEYS
    assert said.count("connection lost") in range(1, 10)


def test_forgotten_when_all_is_well() -> None:
    log = Log()
    log.say("x")
    log.seldom.forget()
    assert log.say("x")
