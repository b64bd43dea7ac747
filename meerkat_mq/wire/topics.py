"""Topic names. Ids are `[A-Za-z0-9_-]{1,64}`: other characters close the connection on some brokers."""

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from meerkat_mq.errors import ConfigError

PREFIX = "meerkat/v1"
SERVER_NAME, OBSERVER_NAME = "meerkat.server", "meerkat.observer"  # users; their dot keeps them apart from node ids
NodeKind = Literal["status", "update", "want"]

_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


def check_identifier(value: str, where: str) -> str:
    """Return `value`, or raise ConfigError where it is no legal federation name or node id."""
    if not _IDENTIFIER.match(value):
        raise ConfigError(where, f"{value!r} is not a legal id", "use 1 to 64 letters, digits, '_' and '-'")
    return value


@dataclass(frozen=True)
class Topics:
    """The topics of one federation."""

    federation: str

    def __post_init__(self) -> None:
        """Refuse, as ConfigError, a name that cannot be a topic level."""
        check_identifier(self.federation, "federation")

    @cached_property
    def root(self) -> str:
        """Everything of the federation lies below."""
        return f"{PREFIX}/{self.federation}"

    @cached_property
    def server(self) -> str:
        """Retained server state (JSON), with a will."""
        return f"{self.root}/server"

    @cached_property
    def run(self) -> str:
        """Retained run descriptor (JSON)."""
        return f"{self.root}/run"

    @cached_property
    def round(self) -> str:
        """Retained round frame."""
        return f"{self.root}/round"

    @cached_property
    def values(self) -> str:
        """Chunks of the newest entry's displacement, not retained."""
        return f"{self.root}/values"

    def blob(self, blob: bytes, index: int | Literal["+"]) -> str:
        """Retained chunk of a content-addressed blob; index "+" makes the filter for all of them."""
        return f"{self.root}/blob/{blob.hex()}/{index}"

    def up(self, node: str, kind: NodeKind) -> str:
        """What a node publishes; node "+" makes the server's filter."""
        return f"{self.root}/up/{node}/{kind}"

    def reply(self, node: str) -> str:
        """What the server answers to one node."""
        return f"{self.root}/down/{node}/reply"

    @lru_cache(maxsize=4096)  # noqa: B019 - bounded, and a federation's topics are few
    def parse_up(self, topic: str) -> tuple[str, str] | None:
        """(node id, kind) of a topic below `up/`, or None where it is none."""
        parts = topic.removeprefix(f"{self.root}/up/").split("/")
        if not topic.startswith(f"{self.root}/up/") or len(parts) != 2 or not _IDENTIFIER.match(parts[0]):
            return None
        return parts[0], parts[1]
