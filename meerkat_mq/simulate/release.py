"""A node of an earlier release, as far as others can tell.

Old code cannot run here. But the releases below send what today's node sends, and keep the same files; they differ in
what they read: a run descriptor with a key that came later is refused, as a whole. So such a node is today's driver
with that refusal. Messages and state folders of those releases hold this file to the truth (tests/simulate).
"""

from typing import Any

from meerkat_mq.core import metrics as m
from meerkat_mq.runtime.node import NodeDriver

# By commit, the keys of a run descriptor that came later.
LATER_KEYS = {
    "04a8509": frozenset({"max_step", "mask_blob", "completion"}),
    "2f02a63": frozenset({"mask_blob", "completion"}),
}


class EarlierDriver(NodeDriver):
    """The driver of a node of that release."""

    def __init__(self, release: str, *args: Any, **ports: Any) -> None:
        super().__init__(*args, **ports)
        self._later = [f'"{key}":'.encode() for key in LATER_KEYS[release]]

    def received(self, topic: str, payload: bytes, *, retained: bool) -> None:
        """A message came; a descriptor that this release does not know is dropped and counted."""
        if topic == self._topics.run and any(key in payload for key in self._later):
            self.counts[m.UNDECODABLE.of("UnknownKey")] += 1
        else:
            super().received(topic, payload, retained=retained)
