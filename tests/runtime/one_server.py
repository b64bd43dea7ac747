"""A server that is a test, and its one node on virtual ports."""

from typing import Any

from meerkat_mq.core.path import Entry
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.runtime.model import NodeProfile, NodeStore
from meerkat_mq.runtime.policy import DEFAULTS, NodePolicy
from meerkat_mq.wire.arrays import encode_mask, split
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import Frame, decode, encode
from meerkat_mq.wire.messages import Header, Round, Update, Want, Welcome
from meerkat_mq.wire.topics import Topics
from tests.runtime.one_node import Nothing, OneNode, descriptor

NODE, SLOT, BOOT = "node-0", 0, 7
TOPICS = Topics("f")
MASK, OTHER_MASK = toy_mask(40), toy_mask(50)
ONE, TWO = descriptor(MASK, rounds=100), descriptor(OTHER_MASK, run="2" * 32, rounds=100)


def header(run: RunDescriptor, version: int = 0) -> Header:
    return Header.of(run.run_id, 1, version, run.mask_hash)


class Server:
    """Says what a server says to its one node, and reads what that says."""

    def __init__(self, store: NodeStore | None = None, policy: NodePolicy = DEFAULTS, **profile: Any) -> None:
        self.node = OneNode(store or Nothing(), NodeProfile(NODE, "f", **profile), BOOT, policy)
        self.node.driver.connected(1)

    def say(self, frame: Frame, topic: str = TOPICS.reply(NODE)) -> None:
        self.node.receive(topic, encode(frame))

    def describe(self, run: RunDescriptor) -> None:
        self.node.receive(TOPICS.run, run.encode(), retained=True)

    def give_mask(self, run: RunDescriptor) -> None:
        """As the broker does that retains it."""
        mask = MASK if run.mask == ONE.mask else OTHER_MASK
        for chunk in split(header(run), mask.hash, encode_mask(mask)):
            self.say(chunk, TOPICS.blob(chunk.blob, chunk.index))

    def state(self, run: RunDescriptor, link: int = 1) -> None:
        said = ServerState(
            status="online", run=run.run, term=1, server_id="0" * 16, link=link, host="hub", round=0, nodes=0
        )
        self.node.receive(TOPICS.server, said.encode(), retained=True)

    def begin(self, run: RunDescriptor) -> None:
        """The node has all that the run needs, and a slot."""
        self.state(run)
        self.describe(run)
        self.give_mask(run)
        self.say(Welcome(header(run), BOOT, SLOT))

    def ask(self, run: RunDescriptor, version: int = 0, entries: tuple[Entry, ...] = (), *, eps: float = 0.5) -> None:
        """Open a round in which the node is asked for steps."""
        asked = frozenset({SLOT})
        frame = Round(header(run, version), True, 1, 1, eps, 1000, asked=asked, entries=entries)
        self.say(frame, TOPICS.round)

    @property
    def statuses(self) -> list[NodeStatus]:
        return [decode_control(sent, NodeStatus) for sent in self.node.transport.on(TOPICS.up(NODE, "status"))]

    @property
    def updates(self) -> list[Update]:
        found = [decode(sent) for sent in self.node.transport.on(TOPICS.up(NODE, "update"))]
        return [frame for frame in found if isinstance(frame, Update)]

    @property
    def wants(self) -> list[Want]:
        found = [decode(sent) for sent in self.node.transport.on(TOPICS.up(NODE, "want"))]
        return [frame for frame in found if isinstance(frame, Want)]
