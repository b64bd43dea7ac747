"""What a session says between two connections, and how long it waits."""

import random
import re
from collections.abc import Sequence
from typing import Any

from meerkat_mq.core.seldom import QUIET_S, Seldom
from meerkat_mq.mqtt.ends import Lost, Refused, Sending
from meerkat_mq.mqtt.timeouts import Timeouts

_RANDOM = random.SystemRandom()  # a fleet that boots from one image must not share a seed
_SUSPICIOUS = 3  # connections in a row that did not last, or that the broker closed at once
_SMALL_BYTES = 1024  # every broker takes a packet of this size
_NO_WILL = (
    "the broker takes this client without a last will, and closes the connection with one: it takes no retained "
    "messages (Mosquitto: retain_available), or no wills"
)
_BOUND = "a broker that binds clients to their certificates or user names does not take that"
_ANOTHER = (
    "another process may use this client id, or the broker denies what was being sent (see its ACL and packet limit)"
)


class BackOff:
    """Full jitter: the pause is drawn from 0.1 to 1 times a step that doubles up to a cap.

    The floor of 0.1 lets a rival with our client id, which our connection has just closed, see that we are there.
    """

    def __init__(self, first_s: float, cap_s: float, refused_cap_s: float = 60.0) -> None:
        self._first_s = first_s
        self._cap_s = cap_s
        self._refused_cap_s = refused_cap_s
        self._step_s = first_s

    def reset(self) -> None:
        """Start with the first step again."""
        self._step_s = self._first_s

    def pause_s(self, *, refused: bool = False) -> float:
        """The next pause; `refused`: trying again soon would not help, and costs the broker."""
        cap_s = self._refused_cap_s if refused else self._cap_s
        step_s = min(self._step_s, cap_s)
        self._step_s = min(2 * step_s, cap_s)
        return step_s * _RANDOM.uniform(0.1, 1.0)


class Trouble:
    """Counts failures, says each kind of them less and less often, and finds a cause that a person can mend."""

    def __init__(self, log: Any, timeouts: Timeouts) -> None:
        self.will_refused = False  # it was seen that the broker takes this client without a will only
        self._log = log
        self._timeouts = timeouts
        self._seldom = Seldom()
        self._back_off = BackOff(timeouts.back_off_first_s, timeouts.back_off_cap_s, timeouts.refused_cap_s)
        self._short_lived = self._unanswered = self._stuck = 0
        self._sending: tuple[Sending, ...] = ()
        self._says_connected = True

    def begin(self) -> None:
        """The session begins to connect, or begins again."""
        self._back_off.reset()
        self._says_connected = True

    def connected(self, link: int) -> None:
        """A connection stands; said where the log's last line about it was another one."""
        self._unanswered, self.will_refused = 0, False
        if self._says_connected:
            self._log.info("connected", link=link)
        self._says_connected = False

    def say(self, event: str, *key: str, **fields: object) -> None:
        """A warning that may come again on each connection; `key` tells it from others of the same event."""
        self._seldom.say(self._log.warning, event, *key, **fields)

    @property
    def sends_one_by_one(self) -> bool:
        """Whether to send so that the message is known that a connection breaks at."""
        return self._short_lived >= _SUSPICIOUS - 1

    @property
    def asks_why(self) -> bool:
        """Whether to try a connection without will: the broker closes each one instead of answering."""
        return not self.will_refused and self._unanswered > 0 and self._unanswered % _SUSPICIOUS == 0

    def ended(self, lost: Lost, lived_s: float | None, flaws: Sequence[str]) -> float:
        """Count and say how a connection ended; the pause before the next, in seconds.

        Args:
            lived_s: since it was begun; None where it never stood.
            flaws: of our own certificate or user name.
        """
        self._count(lost, lived_s)
        refused = isinstance(lost, Refused)
        hint, sure = ("", True) if refused else self._hint(flaws)
        pause_s = self._back_off.pause_s(refused=sure)
        fields: dict[str, object] = {"problem": str(lost), "retry_in_s": round(pause_s, 2)}
        if hint:
            sending = tuple(out.topic for out in lost.sending)
            fields |= {"short_lived": self._short_lived, "sending": sending, "hint": hint}
        failed = "cannot connect" if refused else "broker unreachable"
        event = failed if lived_s is None else "connection lost"
        kind = re.sub(r"\d+", "", str(lost)), hint
        self._says_connected |= self._seldom.say(self._log.warning, event, *kind, **fields)
        return pause_s

    def _count(self, lost: Lost, lived_s: float | None) -> None:
        if lived_s is None:
            self._unanswered = self._unanswered + 1 if lost.unanswered else 0
            if not lost.unanswered and not isinstance(lost, Refused):
                self._short_lived = self._stuck = 0  # it is away: no message of ours ended the connections before
            return
        if lived_s >= QUIET_S:
            self._seldom.forget()
        if lived_s >= self._timeouts.stable_s:
            self._back_off.reset()
            self._short_lived = 0
        else:
            self._short_lived += 1
        same = lost.closed and len(lost.sending) == 1 and lost.sending == self._sending
        self._stuck = self._stuck + 1 if same else 0  # connections in a row that ended with the one before's message
        self._sending = lost.sending

    def _hint(self, flaws: Sequence[str]) -> tuple[str, bool]:
        """What a person may have to mend, and whether it is more than a guess."""
        if self.will_refused:
            return _NO_WILL, True
        suspicious = self._short_lived >= _SUSPICIOUS
        if flaws and suspicious:
            return bound(flaws)["hint"], self._short_lived >= 2 * _SUSPICIOUS
        if self._stuck >= _SUSPICIOUS - 1:
            return _why_not_sent(self._sending[0]), suspicious
        return (_ANOTHER, False) if suspicious else ("", False)


def bound(flaws: Sequence[str]) -> dict[str, str]:
    """The hint that our certificate or user name is not what it should be; {} where it is."""
    return {"hint": f"{'; '.join(flaws)}: {_BOUND}"} if flaws else {}


def _why_not_sent(out: Sending) -> str:
    causes = ["its ACL denies the topic"]
    if out.size > _SMALL_BYTES:
        causes.insert(0, "its packet limit is lower (Mosquitto: max_packet_size, message_size_limit)")
    if out.retain:
        causes.append("it takes no retained messages (Mosquitto: retain_available)")
    return f"the broker closes the connection whenever it gets {out}: {', or '.join(causes)}"
