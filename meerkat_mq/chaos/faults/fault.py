"""What a fault is."""

from abc import abstractmethod
from contextlib import AbstractAsyncContextManager
from random import Random
from typing import ClassVar, Literal

from meerkat_mq.chaos.stage import Stage
from meerkat_mq.config import Section

Place = Literal["broker", "server", "node", "process", "link"]
PATIENCE_S = 30.0  # a process that must end has so long


class Fault(Section):
    """One kind of fault. Its fields are its parameters: keys beside `fault` and `target` in a plan.

    Attributes:
        name: what a plan calls it.
        on: what it strikes; "process" is the server or a node, "link" the link of one of them to the broker.
        attachable: whether it can strike a federation that the drill did not start but only attached to.
        secured: whether it needs a federation with passwords and certificates.
        clocked: whether it needs processes whose wall clock can be stepped.
        scalars: whether it needs nodes that send projected gradients.
    """

    name: ClassVar[str]
    on: ClassVar[Place]
    attachable: ClassVar[bool] = True
    secured: ClassVar[bool] = False
    clocked: ClassVar[bool] = False
    scalars: ClassVar[bool] = False

    @abstractmethod
    def strike(self, stage: Stage, target: str, random: Random) -> AbstractAsyncContextManager[None]:
        """Inject it on entry, heal it on exit.

        Args:
            stage: the federation.
            target: name of the process, also where its link is struck; "broker".
            random: the only source of chance.
        """
