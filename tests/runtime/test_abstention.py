"""A node that cannot take part in its run says so, waits longer each time, and takes part once the cause is gone."""

import itertools
from collections.abc import Callable, Iterator

import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict

from meerkat_mq.core import metrics as m
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Coefficient, Entry
from meerkat_mq.errors import ModelMismatch, RunMismatch
from meerkat_mq.runtime.abstention import FIRST_PAUSE_S, LONGEST_PAUSE_S
from meerkat_mq.runtime.model import Model
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import Reason, Refusal, Round, Welcome
from tests.runtime.one_node import DIGEST, descriptor
from tests.runtime.one_server import BOOT, MASK, ONE, SLOT, TOPICS, TWO, Server, header

FOREIGN = descriptor(MASK, run="3" * 32, engine="os:system")
OTHER = descriptor(MASK, run="4" * 32, engine="others:Engine")


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[EventDict]]:
    with capture_logs() as lines:
        yield lines


@pytest.fixture
def server() -> Server:
    server = Server()
    server.begin(ONE)
    return server


def welcome(server: Server, run: RunDescriptor) -> None:
    server.give_mask(run)
    server.say(Welcome(header(run), BOOT, SLOT))


def test_runs_that_do_not_suit_a_node_do_not_end_it(server: Server, logs: list[EventDict]) -> None:
    server.ask(ONE)
    for run in (FOREIGN, OTHER, FOREIGN):
        server.describe(run)
        said = server.statuses[-1]
        assert (said.status, said.run) == ("starting", run.run)
        assert said.refuses is not None
        assert said.refuses.startswith(f"engine: the run computes with {run.engine!r}, and this file names none")
    server.begin(TWO)
    assert [(said.status, said.refuses) for said in server.statuses[-2:]] == [("online", None)] * 2
    server.ask(TWO)
    assert [update.header.run for update in server.updates] == [header(run).run for run in (ONE, TWO)]
    assert server.node.driver.counts[m.CANNOT_TAKE_PART] == 3
    warned = [line for line in logs if line["event"] == "cannot take part, trying again later"]
    assert warned[0]["problem"].endswith('if you trust that code, install it here and set engine = "os:system"')


def test_a_values_node_waits_where_displacements_are_not_taken() -> None:
    server = Server(values=True)
    server.begin(descriptor(MASK, values=True, rounds=100))
    server.begin(TWO)
    assert (server.statuses[-1].refuses or "").startswith('uplink: is "values", but run 22222222 takes')


class Models:
    """Makes a node's models, unless they are broken; and knows when each was tried."""

    def __init__(self, server: Server) -> None:
        self.broken = True
        self.tried: list[float] = []
        self._server = server
        self._make = server.node.driver._make_model
        server.node.driver._make_model = self.make

    def make(self, run: RunDescriptor, mask: Mask) -> Model:
        self.tried.append(self._server.node.clock.now())
        if self.broken:
            raise ModelMismatch("./model", "another checkpoint", "give the base model")
        return self._make(run, mask)

    def pauses(self, tries: int) -> list[int]:
        """Seconds from each of so many tries to the next."""
        tries += len(self.tried)
        first = len(self.tried)
        while len(self.tried) <= tries:
            self._server.give_mask(TWO)
            self._server.node.clock.go(0.5)
        return [round(after - before) for before, after in itertools.pairwise(self.tried[first:])]


def test_it_tries_again_after_growing_pauses_until_the_cause_is_gone(server: Server) -> None:
    models = Models(server)
    server.describe(TWO)
    pauses = models.pauses(12)
    assert pauses[:3] == [FIRST_PAUSE_S * 2**times for times in range(3)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_S
    models.broken = False
    server.node.clock.go(LONGEST_PAUSE_S)
    welcome(server, TWO)
    server.ask(TWO)
    assert server.updates[-1].header.run == header(TWO).run


def test_after_an_acknowledged_update_the_next_failure_is_a_first_one(server: Server) -> None:
    models = Models(server)
    server.describe(TWO)
    assert models.pauses(3)[-1] > FIRST_PAUSE_S
    models.broken = False
    server.node.clock.go(LONGEST_PAUSE_S)
    welcome(server, TWO)
    server.ask(TWO)
    server.say(Round(header(TWO), True, 1, 1, 0.5, 1000, heard=frozenset({SLOT})), TOPICS.round)
    models.broken = True
    server.describe(ONE)
    server.describe(TWO)
    assert models.pauses(2)[0] == FIRST_PAUSE_S


def test_a_node_that_has_never_taken_part_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    with pytest.raises(RunMismatch, match="the run computes with 'os:system'"):
        server.describe(FOREIGN)
    server = Server()
    server.node.worker.fails.append(ModelMismatch("./model", "another checkpoint"))
    with pytest.raises(ModelMismatch):
        server.describe(ONE)


def test_a_node_that_took_part_before_it_was_restarted_does_not_end() -> None:
    server = Server()
    server.node.driver._store.has_taken_part = lambda: True  # type: ignore[method-assign]
    server.describe(FOREIGN)
    assert (server.statuses[-1].refuses or "").startswith("engine: ")
    server.begin(ONE)
    server.ask(ONE)
    assert len(server.updates) == 1


# --- a theta that never is the server's ---


def wrong(version: int, previous: bytes) -> Entry:
    """An entry after which a PaperModel's digest is another one."""
    return Entry(version, (Coefficient(0, 0, 0.5),), previous, b"e" * 16)


def by_entry(server: Server) -> None:
    server.ask(ONE, 1, (wrong(0, MASK.hash),))


def by_refusal(server: Server) -> None:
    server.ask(ONE)
    server.say(Refusal(header(ONE), BOOT, Reason.RESYNCHRONISE))


@pytest.mark.parametrize("refuse", [by_entry, by_refusal])
def test_digests_that_are_refused_again_and_again_make_it_pause(
    server: Server, refuse: Callable[[Server], None]
) -> None:
    counts, at = server.node.driver.counts, list[float]()
    while len(at) < 5:
        if server.node.machine_is_there:
            refuse(server)
        else:
            server.node.clock.go(0.25)
            welcome(server, ONE)
        if counts[m.CANNOT_TAKE_PART] > len(at):
            at.append(server.node.clock.now())
            assert counts[m.RESYNCHRONISED] == 3 * len(at)
            assert server.statuses[-1].status == "starting"
            assert "does not arrive at the server's theta" in (server.statuses[-1].refuses or "")
    assert [round(after - before) for before, after in itertools.pairwise(at)] == [2, 4, 8, 16]
    server.ask(ONE, 1, (Entry(0, (Coefficient(0, 0, 0.5),), MASK.hash, DIGEST),))  # the cause is gone
    server.node.clock.go(60.0)
    welcome(server, ONE)
    assert server.updates[-1].header.version == 1
