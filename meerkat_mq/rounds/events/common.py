"""What both machines are told, and ask for."""

from dataclasses import dataclass, field

from meerkat_mq.core.metrics import Metric
from meerkat_mq.errors import MeerkatError


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that the machine named in `wake_at` has come."""

    now: float


@dataclass(frozen=True, slots=True)
class Count:
    """Count something noteworthy.

    Attributes:
        reason: what, of the registry.
        node: which one it is about; "" where it is about none.
        round: that it is about: that of the update, else the one that is open.
    """

    reason: Metric
    node: str = ""
    round: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class End:
    """The service ends with this error."""

    error: MeerkatError
