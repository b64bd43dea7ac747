"""The node's driver: runs that change meanwhile, and steps that are stopped."""

import json
import traceback
from collections.abc import Iterator
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from meerkat_mq.core import metrics as m
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Coefficient, Entry, digest
from meerkat_mq.errors import RunMismatch
from meerkat_mq.runtime.model import Model
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.frames import encode
from meerkat_mq.wire.messages import Round, Welcome
from tests.runtime.one_node import DIGEST, descriptor
from tests.runtime.one_server import BOOT, MASK, ONE, SLOT, TOPICS, TWO, Server, header
from tests.runtime.ports import Worker


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
