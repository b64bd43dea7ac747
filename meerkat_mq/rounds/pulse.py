"""How often a state is said again only because theta moved on: for people who watch, at next to no cost."""

from dataclasses import dataclass

LEAST_S = 5.0


@dataclass(slots=True)
class Pulse:
    """Says when a retained state is due to be published again.

    Attributes:
        rounds: after so many, but not within 5 s of the last time.
        slow_s: or after so long, if theta moved on at all.
    """

    rounds: int
    slow_s: float
    _version: int = 0
    _at: float = float("-inf")

    def said(self, version: int, now: float) -> None:
        """The state was published, for whatever reason."""
        self._version, self._at = version, now

    def due(self, version: int, now: float) -> bool:
        """Whether the state, now of this version, is to be published again."""
        moved, waited = abs(version - self._version), now - self._at
        return waited >= LEAST_S and (moved >= self.rounds or (moved > 0 and waited >= self.slow_s))
