"""What the processes of one world share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from meerkat_mq.errors import MeerkatError
from meerkat_mq.ledger.run import Run
from meerkat_mq.wire.frames import decode
from meerkat_mq.wire.messages import Frame
from meerkat_mq.worlds.broker import Broker
from meerkat_mq.worlds.clock import VirtualClock
from meerkat_mq.worlds.replica import Thetas


@dataclass(frozen=True)
class World:
    """One world.

    Attributes:
        thetas: what its processes have computed.
        failed: is told who was ended by an error.
        count: takes (who, reason) of everything counted.
        read: decodes a frame, once for all who receive it.
    """

    clock: VirtualClock
    broker: Broker
    run: Run
    thetas: Thetas
    failed: Callable[[str, MeerkatError], None]
    count: Callable[[str, str], None]
    read: Callable[[bytes], Frame] = field(default_factory=lambda: lru_cache(1024)(decode))
