"""What a node does on purpose, beside what it should: floods, forged terms, invented ids."""

from meerkat_mq.simulate.federation import TOPICS, Federation
from meerkat_mq.simulate.schedule import ScheduledFault
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.frames import encode
from meerkat_mq.wire.messages import Header, Want
from meerkat_mq.worlds.broker import VirtualMessage

BURST = 400  # messages of a flood at once: more than a budget
EVERY_S = 0.25  # between two forged terms
GHOSTS = 6  # invented ids


def flood(federation: Federation, fault: ScheduledFault) -> None:
    """Far more questions than anybody has, and junk, all at once."""
    chance, boot = federation.chance, federation.nodes[fault.target].boot
    mask = federation.world.run.descriptor.mask_name
    for _ in range(BURST):
        header = _header(federation, 0)
        asked = chance.choice(
            (
                Want(header, boot, welcome=True),
                Want(header, boot, entries_from=chance.choice((0, 1, 2**32 - 1))),
                Want(header, boot, blob=mask, chunks=(0, 1, 65_535)),
            )
        )
        _spread(federation, TOPICS.up(fault.target, "want"), encode(asked))
    for _ in range(BURST // 4):
        _spread(federation, TOPICS.up(fault.target, "update"), chance.randbytes(40))


def forge_terms(federation: Federation, fault: ScheduledFault) -> None:
    """One term above the server's, again and again, or as far above as can be said."""
    clock, steps = federation.clock, int(fault.lasts / EVERY_S)

    def forge() -> None:
        above = federation.chance.choice((1, 1, 1, 60, 2**16 - 1, 2**32))
        want = Want(_header(federation, above), federation.nodes[fault.target].boot)
        _spread(federation, TOPICS.up(fault.target, "want"), encode(want))

    for step in range(steps):
        clock.at(fault.at + step * EVERY_S, forge)


def invent_ids(federation: Federation, fault: ScheduledFault, *, heals: bool = False) -> None:
    """Nodes that are not there say that they are; healing, they are gone."""
    for number in range(GHOSTS):
        run = federation.history.settings.run_id.hex()
        said = NodeStatus(
            status="stopped" if heals else "online", boot=number, link=number, host="nowhere", run=run, rows=5
        )
        _spread(federation, TOPICS.up(f"ghost-{fault.target}-{number}", "status"), said.encode())


def _header(federation: Federation, above: int) -> Header:
    """Of the newest term, or so far above it."""
    settings, term = federation.history.settings, max(federation.ledger.terms, default=1)
    version = len(federation.ledger.entries)
    return Header.of(settings.run_id, min(term + above, 2**32 - 1), version, settings.mask_hash)


def _spread(federation: Federation, topic: str, payload: bytes) -> None:
    federation.broker.spread(VirtualMessage(topic, payload))
