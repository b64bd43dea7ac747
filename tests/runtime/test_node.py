"""The node's driver: runs that change meanwhile, steps that are stopped, and frames that nobody should believe."""

import json
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from meerkat_mq.core import metrics as m
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Coefficient, Entry, digest
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.errors import NodeReplaced, RunMismatch
from meerkat_mq.runtime.model import Model, NodeProfile
from meerkat_mq.wire.arrays import encode_mask, split
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import Frame, decode, encode
from meerkat_mq.wire.messages import Chunk, Entries, Header, Offer, Round, Update, Want, Welcome
from meerkat_mq.wire.topics import Topics
from tests.runtime.one_node import DIGEST, Nothing, OneNode, descriptor
from tests.runtime.ports import Worker

NODE, SLOT, BOOT = "node-0", 0, 7
TOPICS = Topics("f")
MASK, OTHER_MASK = toy_mask(40), toy_mask(50)
ONE, TWO = descriptor(MASK, rounds=100), descriptor(OTHER_MASK, run="2" * 32, rounds=100)


def header(run: RunDescriptor, version: int = 0) -> Header:
    return Header.of(run.run_id, 1, version, run.mask_hash)


class Server:
    """Says what a server says to its one node, and reads what that says."""

    def __init__(self, **profile: Any) -> None:
        self.node = OneNode(Nothing(), NodeProfile(NODE, "f", **profile), BOOT)
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

    def ask(self, run: RunDescriptor, version: int = 0, entries: tuple[Entry, ...] = ()) -> None:
        """Open a round in which the node is asked for steps."""
        asked = frozenset({SLOT})
        frame = Round(header(run, version), True, 1, 1, 0.5, 1000, asked=asked, entries=entries)
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


@pytest.fixture(autouse=True)
def logs() -> Iterator[None]:
    with capture_logs():
        yield


@pytest.fixture
def server() -> Server:
    return Server()


def test_a_run_of_a_newer_server_is_refused_in_words_that_help() -> None:
    server = Server()
    with capture_logs() as lines:
        server.node.receive(TOPICS.run, json.dumps({**json.loads(ONE.encode()), "clip": 1.0}).encode(), retained=True)
    (line,) = [line for line in lines if line["event"] == "message dropped"]
    assert (line["log_level"], line["topic"]) == ("warning", TOPICS.run)
    words = "is a key that this release does not know: a newer server sent it; update this program"
    assert line["problem"] == f"RunDescriptor.clip: {words}"
    assert server.node.driver.counts == {"undecodable: UnknownKey": 1}
    server.begin(ONE)  # and it takes the next one
    assert server.node.machine_is_there


def test_a_node_that_missed_the_descriptor_of_a_run_connects_again(server: Server) -> None:
    node = server.node
    for run, others in ((ONE, 0), (TWO, 1)):  # the first one of all, and one that follows another run
        for _ in range(6):
            server.ask(run)
            node.clock.go(1.0)
        assert node.transport.renewed == others + 1
        for _ in range(9):
            server.ask(run)
            node.clock.go(1.0)
        assert node.transport.renewed == others + 1  # the next try is later
        server.begin(run)
        server.ask(run)
        assert [update.header.run for update in server.updates][-1] == header(run).run


def test_a_node_that_is_asked_steps_and_sends(server: Server) -> None:
    server.begin(ONE)
    first, *others = [status.status for status in server.statuses]
    assert (first, set(others)) == ("starting", {"online"})
    assert (server.statuses[-1].run, server.statuses[-1].rows) == (ONE.run, 3)
    server.ask(ONE)
    (update,) = server.updates
    assert (update.header.version, update.boot, update.scalars, update.loss) == (0, BOOT, (0.5,), 0.25)
    (model,) = server.node.models
    assert model.stepped == [0]


def test_a_status_says_how_many_rows_there_are_now(server: Server) -> None:
    server.begin(ONE)
    server.node.models[0].rows = 5
    server.state(ONE, link=2)
    assert server.statuses[-1].rows == 5
    server.describe(TWO)
    server.node.driver.connected(3)
    assert (server.statuses[-1].run, server.statuses[-1].rows) == (TWO.run, 0)


# --- another run ---


def test_another_run_during_the_masks_fetch_gives_it_up(server: Server) -> None:
    server.describe(ONE)
    server.node.clock.go(10.0)
    assert {want.blob for want in server.wants} == {ONE.mask_hash}
    server.describe(TWO)
    asked = len(server.wants)
    assert server.node.transport.filters == {TOPICS.blob(TWO.mask_hash, "+")}
    server.node.clock.go(100.0)
    assert {want.blob for want in server.wants[asked:]} == {TWO.mask_hash}
    server.give_mask(TWO)
    assert [model.run.run for model in server.node.models] == [TWO.run]
    assert server.statuses[-1].run == TWO.run
    assert server.node.transport.filters == set()


def test_of_runs_that_take_turns_only_the_last_ones_model_is_made(server: Server) -> None:
    server.begin(ONE)
    server.begin(TWO)
    server.node.worker.held = True
    for run in (ONE, TWO, ONE, TWO, ONE):
        server.describe(run)
    server.node.worker.free()
    server.give_mask(ONE)
    assert [model.run.run for model in server.node.models] == [ONE.run, TWO.run, ONE.run]


def test_theta_0_is_not_hashed_by_whoever_brings_a_message(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest_here(theta: Float32Array) -> bytes:
        callers.append({frame.name for frame in traceback.extract_stack()})
        return digest(theta)

    callers: list[set[str]] = []
    monkeypatch.setattr("meerkat_mq.runtime.node.digest", digest_here)
    server.begin(ONE)
    assert [Worker._do_next.__name__ in names for names in callers] == [True]


def test_another_run_before_a_model_is_made_leaves_that_one_unmade(server: Server) -> None:
    server.node.worker.held = True
    server.describe(ONE)
    server.node.worker.do()  # looks for a kept mask
    server.give_mask(ONE)
    server.node.worker.do(2)  # decodes it, and keeps it
    server.describe(TWO)
    server.node.worker.free()
    assert server.node.driver.machine is None
    server.give_mask(TWO)
    assert [model.run.run for model in server.node.models] == [TWO.run]
    assert [status.run for status in server.statuses if status.status == "online"] == [TWO.run]


def test_another_run_while_a_model_is_made_leaves_that_one_unused(server: Server) -> None:
    def make(run: RunDescriptor, mask: Mask) -> Model:
        if run == ONE:
            server.node.driver.received(TOPICS.run, TWO.encode(), retained=True)
        return make_model(run, mask)

    make_model, server.node.driver._make_model = server.node.driver._make_model, make
    server.describe(ONE)
    server.give_mask(ONE)
    assert server.node.driver.machine is None
    server.give_mask(TWO)
    assert [model.run.run for model in server.node.models] == [ONE.run, TWO.run]
    assert server.statuses[-1].run == TWO.run


def test_another_run_during_local_steps_stops_them_and_hears_nothing_of_them(server: Server) -> None:
    server.begin(ONE)
    server.node.worker.held = True
    server.ask(ONE)
    stopped = server.node.worker.stopped
    assert server.node.worker.waiting == 1
    server.describe(TWO)
    assert server.node.worker.stopped == stopped + 1
    server.node.worker.free()
    assert (server.node.models[0].ordered != [], server.node.models[0].stepped) == (True, [])
    server.give_mask(TWO)
    server.say(Welcome(header(TWO), BOOT, SLOT))
    server.ask(TWO)
    assert [update.header.run for update in server.updates] == [header(TWO).run]


def test_another_run_whose_steps_came_too_late_to_be_stopped_sends_nothing_of_the_first(server: Server) -> None:
    server.begin(ONE)
    model = server.node.models[0]
    model.step = lambda order, stop, made: model.finish(order)  # type: ignore[method-assign]
    server.node.worker.held = True
    server.ask(ONE)
    server.describe(TWO)
    server.node.worker.free()
    assert model.stepped == [0]
    assert server.updates == []
    server.give_mask(TWO)
    assert server.statuses[-1].run == TWO.run


def test_another_run_while_entries_are_applied_starts_at_nothing(server: Server) -> None:
    server.begin(ONE)
    server.node.worker.held = True
    entry = Entry(0, (Coefficient(0, 0, 0.5),), MASK.hash, DIGEST)
    server.ask(ONE, 1, (entry,))
    assert server.node.worker.waiting == 1
    server.describe(TWO)
    server.node.worker.free()
    server.give_mask(TWO)
    assert server.statuses[-1].run == TWO.run
    assert server.statuses[-1].version == 0
    assert server.node.models[-1].entries == []


def test_a_node_that_goes_back_to_theta_0_says_so_and_nothing_else(server: Server) -> None:
    server.begin(ONE)
    entry = Entry(0, (), MASK.hash, DIGEST)
    server.ask(ONE, 1, (entry,))
    another = replace(entry, previous=bytes(16))
    server.say(  # the first word of another server, and of another past
        Round(replace(header(ONE, 1), term=2), True, 1, 1, 0.5, 1000, asked=frozenset(), entries=(another,)),
        TOPICS.round,
    )
    assert server.node.driver.counts[m.RESYNCHRONISED] == 1
    said = {(status.version, status.digest) for status in server.statuses if status.status == "online"}
    assert said == {(0, digest(MASK.theta_0).hex())}


def test_the_same_run_described_again_changes_nothing(server: Server) -> None:
    server.begin(ONE)
    said = len(server.node.transport.sent)
    server.describe(ONE)
    assert (len(server.node.models), len(server.node.transport.sent)) == (1, said)


def test_a_round_that_overtook_its_runs_descriptor_is_taken_and_an_older_runs_is_not(server: Server) -> None:
    server.begin(ONE)
    server.ask(ONE)
    server.ask(TWO)  # some brokers keep no order among topics
    server.describe(TWO)
    server.give_mask(TWO)
    server.say(Welcome(header(TWO), BOOT, SLOT))
    assert [update.header.run for update in server.updates] == [header(ONE).run, header(TWO).run]


def test_a_run_that_the_node_cannot_take_part_in_ends_it_from_the_clock_not_from_the_session() -> None:
    server = Server(values=True)
    server.node.driver.received(TOPICS.run, ONE.encode(), retained=True)
    with pytest.raises(RunMismatch, match="takes projected gradients only"):
        server.node.clock.settle()
    assert not server.node.transport.disowned  # it leaves in words


def test_an_engine_that_the_nodes_owner_did_not_name_is_refused_before_the_mask_is_fetched() -> None:
    server = Server()
    server.node.driver.received(TOPICS.run, descriptor(MASK, engine="ours:Engine").encode(), retained=True)
    with pytest.raises(RunMismatch, match="computes with 'ours:Engine', and this file names none"):
        server.node.clock.settle()
    assert (server.wants, server.node.transport.filters) == ([], set())


# --- steps that are stopped ---


def test_steps_that_are_stopped_before_they_begin_are_not_begun(server: Server) -> None:
    server.begin(ONE)
    driver = server.node.driver
    asked = Round(header(ONE), True, 1, 1, 0.5, 1000, asked=frozenset({SLOT}))
    driver.received(TOPICS.round, encode(asked), retained=False)
    closed = Entry(0, (Coefficient(0, 0, 0.5),), MASK.hash, DIGEST)
    later = Round(header(ONE, 1), False, 1, 1, 0.5, 0, entries=(closed,))
    driver.received(TOPICS.round, encode(later), retained=False)
    server.node.clock.settle()
    (model,) = server.node.models
    assert (model.ordered, server.updates) == ([], [])
    assert [entry.version for entry in model.entries] == [0]


def test_steps_that_are_being_made_end_early_when_the_round_is_over(server: Server) -> None:
    server.begin(ONE)
    server.node.worker.held = True
    server.ask(ONE)
    stopped, moved_on = server.node.worker.stopped, server.node.worker.moved_on
    closed = Entry(0, (Coefficient(0, 0, 0.5),), MASK.hash, DIGEST)
    server.say(Round(header(ONE, 1), False, 1, 1, 0.5, 0, entries=(closed,)), TOPICS.round)
    assert server.node.worker.stopped > stopped
    assert server.node.worker.moved_on > moved_on
    server.node.worker.free()
    (model,) = server.node.models
    assert ([order.version for order in model.ordered], model.stepped, server.updates) == ([0], [], [])
    assert [entry.version for entry in model.entries] == [0]


def test_steps_that_waited_for_another_job_learn_that_the_run_has_moved_on(server: Server) -> None:
    run, asked = descriptor(MASK, rounds=100, mode="buffered", max_staleness=5), frozenset({SLOT})
    server.begin(run)
    server.ask(run)
    worker, closed = server.node.worker, Entry(0, (Coefficient(0, 0, 0.5),), MASK.hash, DIGEST)
    worker.held = True
    heard = Round(header(run, 1), True, 1, 1, 0.5, 0, asked=asked, entries=(closed,), heard_before=((SLOT, 1),))
    server.say(heard, TOPICS.round)
    worker.do()  # the entry; the acknowledged update is forgotten before the next steps begin
    server.ask(run, 2)
    moved_on = worker.moved_on
    worker.do(2)
    assert worker.moved_on == moved_on + 1
    worker.free()
    assert [order.version for order in server.node.models[0].ordered] == [0, 1]


def test_a_node_that_stops_tells_its_steps(server: Server) -> None:
    server.node.driver.stop()
    assert server.node.worker.stopped == 0
    server.begin(ONE)
    server.node.driver.stop()
    assert server.node.worker.stopped == 1


def test_a_node_that_goes_to_sleep_does_not_say_that_it_is_online(server: Server) -> None:
    server.begin(ONE)
    entries, previous = list[Entry](), MASK.hash
    for version in range(20):
        entries.append(Entry(version, (Coefficient(0, 0, 0.5),), previous, DIGEST))
        previous = entries[-1].hash(ONE.run_id)
    server.node.worker.held = True
    server.ask(ONE, 20, tuple(entries))
    server.node.clock.go(10.0)
    said = len(server.statuses)
    server.node.driver.sleep()  # its connection ends once what waits is sent, and "asleep" as the last
    server.node.worker.free()
    server.node.clock.go(100.0)
    assert (len(server.node.models[0].entries), len(server.statuses)) == (20, said)
    server.node.driver.wake()
    server.node.driver.connected(2)
    assert [status.version for status in server.statuses[said:]] == [20]


# --- what nobody should believe ---


def spoiled(payload: bytes) -> bytes:
    return payload[:-1] + bytes([payload[-1] ^ 1])


HOSTILE = {
    "a corrupted round": (TOPICS.round, spoiled(encode(Round(header(ONE), True, 1, 1, 0.5, 1000)))),
    "a round that is cut": (TOPICS.round, encode(Round(header(ONE), True, 1, 1, 0.5, 1000))[:-3]),
    "noise for a round": (TOPICS.round, b"\xff" * 40),
    "noise for a reply": (TOPICS.reply(NODE), b"\x00"),
    "noise for a server": (TOPICS.server, b"{"),
    "a run that is none": (TOPICS.run, b"[]"),
    "a run of another federation": (TOPICS.run, descriptor(OTHER_MASK, run="3" * 32, federation="g").encode()),
    "a mask as large as no mask": (
        TOPICS.run,
        descriptor(OTHER_MASK, run="3" * 32, mask_bytes=2**31, mask_chunks=2**15).encode(),
    ),
    "a displacement as large as none": (
        TOPICS.values,
        encode(Chunk(header(ONE), bytes(16), 0, 2, 70_000, bytes(65536))),
    ),
    "a round as a reply": (TOPICS.reply(NODE), encode(Round(header(ONE), True, 1, 1, 0.5, 1000))),
    "a reply as a round": (TOPICS.round, encode(Welcome(header(ONE), BOOT, 5))),
    "an update": (TOPICS.reply(NODE), encode(Update(header(ONE), BOOT, bytes(8), 0.5, (0.5,)))),
    "entries of another run": (
        TOPICS.reply(NODE),
        encode(Entries(header(TWO), (Entry(0, (Coefficient(0, 0, 0.5),), MASK.hash, DIGEST),))),
    ),
    "entries of another chain": (
        TOPICS.reply(NODE),
        encode(Entries(header(ONE, 1), (Entry(0, (Coefficient(0, 0, 0.5),), bytes(16), DIGEST),))),
    ),
    "an offer of another run": (TOPICS.reply(NODE), encode(Offer(header(TWO, 50), 50, bytes(16), 1000))),
}


@pytest.mark.parametrize(("topic", "payload"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_forged_or_corrupted_changes_nothing_but_a_counter(server: Server, topic: str, payload: bytes) -> None:
    server.begin(ONE)
    sent, counted = list(server.node.transport.sent), server.node.driver.counts.total()
    server.node.receive(topic, payload)
    assert server.node.driver.counts.total() == counted + 1
    (model,) = server.node.models
    assert (model.entries, model.ordered, server.node.transport.sent) == ([], [], sent)
    server.ask(ONE)
    assert [update.header.version for update in server.updates] == [0]


def test_a_forged_status_is_put_right_and_a_newer_process_is_left_to_itself(server: Server) -> None:
    server.begin(ONE)
    own, said = TOPICS.up(NODE, "status"), len(server.statuses)
    server.node.receive(own, b"forged")
    assert [status.status for status in server.statuses[said:]] == ["online"]
    newer = NodeStatus(status="online", boot=BOOT + 1, link=9, host="elsewhere")
    with pytest.raises(NodeReplaced, match="runs on host elsewhere"):
        server.node.receive(own, newer.encode())
    assert server.node.transport.disowned


# --- what the session does not take ---


def test_what_finds_no_room_is_counted_and_the_node_goes_on(server: Server) -> None:
    server.begin(ONE)
    server.node.transport.room = 0
    server.ask(ONE)
    assert (server.updates, server.node.driver.counts["not sent: Update"]) == ([], 1)
    server.node.transport.room = None
    server.ask(ONE)
    assert [update.header.version for update in server.updates] == [0]


def test_without_a_connection_nothing_is_asked(server: Server) -> None:
    server.node.transport.link = None
    server.node.driver.disconnected()
    server.describe(ONE)
    server.node.clock.go(100.0)
    assert server.wants == []
    server.node.transport.link = 2
    server.node.driver.connected(2)
    server.node.clock.settle()
    assert {want.blob for want in server.wants} == {ONE.mask_hash}
