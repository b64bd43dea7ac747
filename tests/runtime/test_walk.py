"""Nothing that decodes ends a node or a server: all frames and all control messages, every field at its extremes.

What may end one, and only it, is written down here: each error that leaves a driver, with the topic that it comes by.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from meerkat_mq import errors
from meerkat_mq.core.path import Coefficient, Displacement, Entry, short_hash
from meerkat_mq.errors import (
    AnotherServer,
    BadValue,
    Fate,
    LedgerError,
    MeerkatError,
    NodeReplaced,
    RunError,
    TooLarge,
    WireError,
)
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.runtime.abstention import LONGEST_PAUSE_S
from meerkat_mq.wire.arrays import split
from meerkat_mq.wire.descriptor import ControlMessage, NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import MAX_SLOTS, MAX_STEPS, decode, encode
from meerkat_mq.wire.messages import (
    Chunk,
    Entries,
    Frame,
    Header,
    Offer,
    Reason,
    Refusal,
    Round,
    Update,
    Values,
    Want,
    Welcome,
)
from tests.runtime import one_server as one
from tests.runtime.lone_server import TOPICS, OneServer
from tests.runtime.one_node import DIGEST, PaperModel, descriptor

INTEGERS = (0, 1, 2**8, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
FLOATS = (0.0, -0.0, 1e-45, 2.0**-126, 1.0, 3.4028234663852886e38, -3.4028234663852886e38, math.nan, math.inf)
SLOTS = (frozenset[int](), frozenset({MAX_SLOTS - 1}), frozenset(range(MAX_SLOTS)))
TERM = Coefficient(0, 0, 1.0)
HONEST, EVIL = ("node-0", "node-1", "node-2"), "evil"


def extremes(name: str, value: Any) -> tuple[Any, ...]:
    """Values of a field like this one, as far out as it may go, and further."""
    match value:
        case bool():
            return (False, True)
        case Reason():
            return tuple(Reason)
        case int():
            return INTEGERS
        case float():
            return FLOATS
        case bytes():
            return (bytes(len(value)), b"\xff" * len(value), b"", bytes(65_536))
        case frozenset():
            return SLOTS
        case Values():
            return (None, *(Values(b"\xff" * 16, size, steps) for size in INTEGERS for steps in (0, 1, MAX_STEPS)))
        case tuple() if name == "scalars":
            return (*((number,) for number in FLOATS), (1.0,) * MAX_STEPS, ())
        case tuple() if name == "entries":
            last = Displacement(b"\xff" * 16, 2**28)
            odd = (Entry(version, (TERM,), bytes(16), b"\xff" * 16, last) for version in INTEGERS)
            return ((), *((entry,) for entry in odd), (Entry(0, (TERM,) * 2000, bytes(16), bytes(16)),) * 3)
        case tuple() if name in ("short", "heard_before"):
            return ((), ((0, 1),), ((MAX_SLOTS - 1, MAX_STEPS - 1),), tuple((slot, 1) for slot in range(16_000)))
        case tuple() | None:
            return (None, (), (0,), tuple(range(65_535)), *((number,) for number in INTEGERS), *INTEGERS, b"\xff" * 16)
        case _:
            raise AssertionError(f"{name} is {value!r}")


def variants(frame: Frame) -> Iterator[bytes]:
    """The frame, with each field of it and of its header at its extremes, as far as that decodes."""
    changed = [replace(frame, header=replace(frame.header, **change)) for change in _changes(frame.header)]
    changed += [replace(frame, **change) for change in _changes(frame)]
    for found in changed:
        try:
            payload = encode(found)
            decode(payload)
        except (BadValue, TooLarge, TypeError, AttributeError, ValueError):
            continue  # nobody can send it
        yield payload


def _changes(frame: Any) -> Iterator[dict[str, Any]]:
    for field in fields(frame):
        if field.name != "header":
            yield from ({field.name: value} for value in extremes(field.name, getattr(frame, field.name)))


def control_variants(message: ControlMessage) -> Iterator[bytes]:
    """The same of a control message."""
    said = json.loads(message.encode())
    numbers = ("", "x" * 255, "f" * 32, "0" * 64, None, True, False, *INTEGERS, 2.0**-126, 1.0, 3.4028234663852886e38)
    words = ("online", "starting", "asleep", "stopped", "lost", "finished", "buffered", "transformers", "rademacher")
    for name in said:
        for odd in (*numbers, *words):
            payload = json.dumps(said | {name: odd}).encode()
            try:
                decode_control(payload, type(message))
            except WireError:
                continue
            yield payload


def frames_of(header: Header, base: bytes) -> list[Frame]:
    """One of each type, close to what is expected."""
    return [
        Update(header, 1, base, 1.0, (1.0,)),
        Update(header, 1, base, 1.0, (), values=Values(bytes(16), 100, 1)),
        Want(header, 1, True, 0, bytes(16), (0,)),
        Chunk(header, bytes(16), 0, 1, 3, b"abc"),
        Round(header, True, 1, 1, 0.5, 1000, asked=frozenset({0}), short=(), entries=()),
        Welcome(header, 7, 0),
        Entries(header, ()),
        Offer(header, 50, bytes(16), 1000),
        Refusal(header, 7, Reason.RESYNCHRONISE),
    ]


FRAMES = range(len(frames_of(Header.of(bytes(16), 1, 0, bytes(16)), bytes(8))))


# --- a server ---


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OneServer]:
    with capture_logs(), closing(Ledger.open(tmp_path / LEDGER_FILE)) as ledger:
        server = OneServer(ledger)
        server.take_charge()
        for node in (*HONEST, EVIL):
            server.born(node)
        yield server


def goes_on(server: OneServer) -> bool:
    """Another round closes, whoever made the server take another term meanwhile."""
    server.clock.go(100.0)
    server.reconnect()
    before = server.driver.writer.committed[0]
    for node in HONEST:
        server.born(node)
        server.receive(TOPICS.up(node, "update"), server.update())
    server.clock.until(lambda: server.driver.writer.committed[0] > before, within_s=2000.0)
    return True


@pytest.mark.parametrize("kind", ["update", "want"])
@pytest.mark.parametrize("number", FRAMES)
def test_no_frame_ends_a_server(server: OneServer, number: int, kind: Any) -> None:
    header = server.header()
    sent = 0
    for payload in variants(frames_of(header, bytes(8))[number]):
        server.receive(TOPICS.up(EVIL, kind), payload)
        server.clock.go(0.2)
        server.reconnect()
        sent += 1
    assert sent > 5
    assert goes_on(server)


def test_no_status_ends_a_server(server: OneServer) -> None:
    status = NodeStatus(status="online", boot=1, link=1, host="h", run=server.run.descriptor.run, rows=3)
    for number, payload in enumerate(control_variants(status)):
        server.receive(TOPICS.up(f"evil-{number % 5}", "status"), payload)
        server.clock.go(0.2)
    assert goes_on(server)


def test_only_a_server_of_a_higher_rank_ends_a_server(server: OneServer) -> None:
    mine = server.states[-1]
    for payload in control_variants(mine.model_copy(update={"server_id": "0" * 16, "term": 0})):
        state = decode_control(payload, ServerState)
        if state.rank > mine.rank:
            with pytest.raises(AnotherServer):
                server.receive(TOPICS.server, payload)
            server.transport.disowned = False
        else:
            server.receive(TOPICS.server, payload)
    assert goes_on(server)


# --- a node ---


def walked(payload: bytes, topic: str) -> one.Server:
    """A node in a round that is given this, and time for whatever comes of it."""
    with capture_logs():
        server = one.Server()
        server.begin(one.ONE)
        server.ask(one.ONE)
        server.node.receive(topic, payload)
        server.node.clock.go(5.0)
    return server


@pytest.mark.parametrize("number", FRAMES)
def test_no_frame_ends_a_node(number: int) -> None:
    topics = (one.TOPICS.round, one.TOPICS.reply(one.NODE))
    payloads = list(variants(frames_of(one.header(one.ONE), bytes(8))[number]))
    assert len(payloads) > 5
    for payload in payloads:
        for topic in topics:
            assert walked(payload, topic).node.driver.machine is not None


@pytest.mark.parametrize("rounds", [100, 2**32 - 1])
def test_no_snapshot_near_the_end_of_all_versions_ends_a_node(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version after the entry that follows it is none that a status or a frame can name."""
    monkeypatch.setattr(PaperModel, "load", lambda model, blob, offer: (bytes(16), DIGEST))
    run, version, blob = descriptor(one.MASK, rounds=rounds), rounds - 1 if rounds > 100 else 2**32 - 1, b"abc"
    with capture_logs():
        server = one.Server()
        server.begin(run)
        server.say(Offer(one.header(run, version), version, short_hash(blob), len(blob)))
        for chunk in split(one.header(run, version), short_hash(blob), blob):
            server.say(chunk)
        server.ask(run, version)
        server.node.clock.go(5.0)
        server.say(Entries(one.header(run, version), (Entry(version, (TERM,), bytes(16), DIGEST),)))
        server.node.clock.go(5.0)
        server.state(run, link=2)
        server.node.clock.go(5.0)
    machine = server.node.driver.machine
    assert machine is not None
    assert machine.version == (rounds if rounds > 100 else 0)
    assert server.node.driver.counts["beyond the run's end"] == 3 * (rounds == 100)


def test_no_state_of_a_server_ends_a_node() -> None:
    state = ServerState(status="online", run=one.ONE.run, term=1, server_id="0" * 16, link=1, host="hub", round=0)
    for payload in control_variants(state):
        assert walked(payload, one.TOPICS.server).node.driver.machine is not None


def test_no_description_of_the_run_ends_a_node() -> None:
    for payload in control_variants(one.ONE):
        walked(payload, one.TOPICS.run)


def test_only_a_newer_process_of_its_own_ends_a_node() -> None:
    """Its own status topic, which on a broker with certificates nobody else writes."""
    own = one.TOPICS.up(one.NODE, "status")
    status = NodeStatus(status="online", boot=one.BOOT + 1, link=9, host="h")
    for payload in control_variants(status):
        said = decode_control(payload, NodeStatus)
        if said.boot != one.BOOT and said.status in ("online", "starting"):
            with pytest.raises(NodeReplaced):
                walked(payload, own)
        else:
            walked(payload, own)


# --- errors ---


def tree(error: type[MeerkatError] = MeerkatError) -> Iterator[type[MeerkatError]]:
    yield error
    for below in error.__subclasses__():
        yield from tree(below)


ERRORS = (*sorted(set(tree()), key=str), OSError, MemoryError, RuntimeError)
ENTRY = Entry(0, (TERM,), one.MASK.hash, DIGEST)


def failure(error: type[Exception]) -> Exception:
    return error("somewhere", "what is wrong") if issubclass(error, MeerkatError) else error("what is wrong")


# What a node is told first, and what then makes it work.
WORK: dict[str, tuple[Callable[[one.Server], None], Callable[[one.Server], None]]] = {
    "a run": (lambda server: None, lambda server: server.describe(one.TWO)),
    "a mask": (lambda server: server.describe(one.TWO), lambda server: server.give_mask(one.TWO)),
    "a round": (lambda server: None, lambda server: server.ask(one.ONE)),
    "a round with an entry": (lambda server: None, lambda server: server.ask(one.ONE, 1, (ENTRY,))),
    "entries": (
        lambda server: server.ask(one.ONE, 1),
        lambda server: server.say(Entries(one.header(one.ONE, 1), (ENTRY,))),
    ),
    "a snapshot": (
        lambda server: server.say(Offer(one.header(one.ONE, 1), 1, short_hash(b"abc"), 3)),
        lambda server: server.say(Chunk(one.header(one.ONE, 1), short_hash(b"abc"), 0, 1, 3, b"abc")),
    ),
    "a refusal": (
        lambda server: server.ask(one.ONE),
        lambda server: server.say(Refusal(one.header(one.ONE), one.BOOT, Reason.RESYNCHRONISE)),
    ),
    "a welcome": (lambda server: None, lambda server: server.say(Welcome(one.header(one.ONE), one.BOOT, one.SLOT))),
    "a new connection of the server": (lambda server: None, lambda server: server.state(one.ONE, link=2)),
}


def takes_part(server: one.Server, run: RunDescriptor) -> bool:
    """After a while, whatever the node had to begin again."""
    server.describe(run)
    server.node.clock.go(LONGEST_PAUSE_S)
    server.give_mask(run)
    server.say(Welcome(one.header(run), one.BOOT, one.SLOT))
    before = len(server.updates)
    server.ask(run)
    server.node.clock.go(100.0)
    return len(server.updates) > before


@pytest.mark.parametrize("job", range(3))
@pytest.mark.parametrize("message", WORK)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_no_error_of_its_work_ends_a_node_that_takes_part(error: type[Exception], message: str, job: int) -> None:
    """Whatever a model, a disk or a decoder raises: in each job that each message leads to."""
    with capture_logs():
        server = one.Server()
        server.begin(one.ONE)
        first, then = WORK[message]
        first(server)
        server.node.worker.fails.extend([*[None] * job, failure(error)])
        then(server)
        server.node.clock.go(5.0)
        server.node.worker.fails.clear()
        server.describe(one.ONE)  # a policy that refused a run refuses it until another one is described
        assert takes_part(server, one.TWO)
        assert takes_part(server, one.ONE)


@pytest.mark.parametrize("error", [*sorted(set(tree(LedgerError)), key=str)], ids=lambda error: error.__name__)
@pytest.mark.parametrize("asked", ["entries", "chunks"])
def test_no_want_ends_a_server_whose_ledger_cannot_be_read(server: OneServer, error: Any, asked: str) -> None:
    server.receive(TOPICS.up(HONEST[0], "update"), server.update())
    server.clock.go(1.0)
    what: dict[str, Any] = {"entries_from": 0} if asked == "entries" else {"blob": bytes(16), "chunks": (0,)}
    server.ledger_work.fails.append(failure(error))
    server.receive(TOPICS.up(EVIL, "want"), encode(Want(server.header(), 1, **what)))
    server.clock.go(1.0)
    assert not server.ledger_work.fails
    assert goes_on(server)


def test_what_does_not_decode_is_dropped_and_what_is_final_is_of_the_run() -> None:
    assert {error for error in tree(WireError) if error.fate is not Fate.DROPPED} == set()
    assert {AnotherServer, NodeReplaced} <= {error for error in tree(RunError) if error.fate is Fate.AGAIN}
    assert errors.MeerkatError.fate is Fate.FINAL
