"""Pauses between connection attempts."""

import random

_RANDOM = random.SystemRandom()  # a fleet that boots from one image must not share a seed


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
        """The next pause.

        Args:
            refused: trying again soon would not help, and costs the broker.
        """
        cap_s = self._refused_cap_s if refused else self._cap_s
        step_s = min(self._step_s, cap_s)
        self._step_s = min(2 * step_s, cap_s)
        return step_s * _RANDOM.uniform(0.1, 1.0)
