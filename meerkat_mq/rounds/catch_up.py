"""The cheapest way for a node to come back to the head: the entries that it missed, or a snapshot and those after it.

`benchmarks/catch_up.py` measures the constants and the crossover.
"""

from dataclasses import dataclass

LINK_BYTES_A_SECOND = 1e6  # what a gateway's link is taken to carry
REPLAY_NS = 3.0  # a weight and term: its direction made and added
DIGEST_NS = 2.4  # a weight and due digest
LOAD_NS = 10.0  # a weight of a snapshot: decompressed, hashed, digested
ENTRY_BYTES = 38  # an encoded entry without terms
TERM_BYTES = 8


@dataclass(frozen=True, slots=True)
class Stretch:
    """Ledger entries in a row.

    Attributes:
        entries: how many.
        size: their encoded bytes.
        displaced: bytes of their displacements.
    """

    entries: int
    size: int
    displaced: int = 0

    @property
    def terms(self) -> int:
        """How many terms these bytes hold."""
        return (self.size - ENTRY_BYTES * self.entries) // TERM_BYTES

    def seconds(self, weights: int, digest_every: int) -> float:
        """What it takes a node to receive and apply them."""
        replay_ns = weights * (REPLAY_NS * self.terms + DIGEST_NS * (self.entries // digest_every))
        return (self.size + self.displaced) / LINK_BYTES_A_SECOND + replay_ns * 1e-9


def snapshot_is_cheaper(
    missed: Stretch, after: Stretch, *, weights: int, snapshot_bytes: int, digest_every: int
) -> bool:
    """Whether a snapshot brings a node to the head sooner than all the entries that it missed.

    Args:
        missed: from the node's version to the head.
        after: from the snapshot's version to the head.
        weights: n.
        snapshot_bytes: size of the snapshot blob.
        digest_every: of the run.
    """
    load = snapshot_bytes / LINK_BYTES_A_SECOND + LOAD_NS * weights * 1e-9
    return load + after.seconds(weights, digest_every) < missed.seconds(weights, digest_every)
