"""What somebody has used of an allowance: more with each use, less with time (a token bucket, seen from its bottom)."""

from dataclasses import dataclass


@dataclass(slots=True)
class Used:
    """Nothing at first; `rate` of it is forgiven for each unit of time that passes.

    The size of the allowance is asked about where something is used, not kept here: it may depend on the run.
    """

    rate: float
    _amount: float = 0.0
    _at: float = 0.0

    def now(self, time: float) -> float:
        """What counts still."""
        return max(0.0, self._amount - self.rate * (time - self._at))

    def add(self, time: float, amount: float) -> None:
        """Use so much more; what is negative is given back."""
        self._amount, self._at = max(0.0, self.now(time) + amount), time
