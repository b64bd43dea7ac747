"""Whether the broker's packets hold what a run cannot do without; seen before it starts."""

from collections.abc import Iterator

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.path import Coefficient, Displacement, Entry
from meerkat_mq.errors import ConfigError
from meerkat_mq.ledger.run import Run
from meerkat_mq.wire.frames import encode
from meerkat_mq.wire.limits import LONGEST_ID, packet_bytes
from meerkat_mq.wire.messages import Entries, Header, Round, Update
from meerkat_mq.wire.topics import Topics


def check_room(config: ServerConfig, run: Run) -> None:
    """Make sure that packets hold the largest of each kind of message.

    Raises:
        ConfigError: one of them is larger than `broker.max_packet_bytes`.
    """
    limit = config.broker.max_packet_bytes
    for what, topic, payload in _needed(run, Topics(config.federation)):
        size = packet_bytes(topic, payload, 1)
        if size > limit:
            problem = f"is {limit}, and {what} makes a packet of {size} bytes"
            raise ConfigError(
                "broker.max_packet_bytes", problem, f"set it to {size} or more, and the broker's limit too"
            )


def _needed(run: Run, topics: Topics) -> Iterator[tuple[str, str, bytes]]:
    """What a packet must hold, its topic and its payload."""
    settings, header, first = run.settings, Header.of(bytes(16), 0, 0, bytes(8)), run.chunks(0)[0]
    yield "the run's description", topics.run, run.descriptor.encode()
    yield "a part of the mask", topics.blob(first.blob, first.index), encode(first)
    slots = frozenset(range(settings.fewest_nodes))
    short = tuple((slot, 1) for slot in sorted(slots)) if settings.early_stops else ()
    asked = Round(header, True, settings.most_steps, settings.directions, 1.0, 0, asked=slots, short=short)
    yield f"a round of {len(slots)} nodes", topics.round, encode(asked)
    scalars = settings.most_steps * settings.perturbations
    seeds = (0,) * scalars if settings.buffered else None  # a node may send such an update after a restart
    update = Update(header, 0, bytes(8), 0.0, (0.0,) * scalars, seeds)
    yield "an update of a node", topics.up(LONGEST_ID, "update"), encode(update)
    terms = (Coefficient(0, 0, 0.0, min(1, settings.max_staleness)),) * (
        settings.directions * scalars * (settings.max_staleness + 1)
    )
    added = Displacement(bytes(16), 1) if settings.values.accept else None
    entries = Entries(header, (Entry(1, terms, bytes(16), bytes(16), added),))
    yield "a round's entry", topics.reply(LONGEST_ID), encode(entries)
