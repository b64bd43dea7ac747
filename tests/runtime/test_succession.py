"""Who may take charge, by what stands on the broker."""

from dataclasses import dataclass, field

import pytest

from meerkat_mq.errors import AnotherServer, LedgerError
from meerkat_mq.runtime.succession import ANSWER_S, Past, Succession
from meerkat_mq.wire.descriptor import ServerState
from tests.runtime.ports import VirtualClock

RUN, OTHER = "1" * 32, "2" * 32
KNOWN = frozenset({(1, "a" * 16), (2, "b" * 16)})


def state(status: str = "online", run: str = RUN, term: int = 2, server_id: str = "b" * 16, at: int = 0) -> ServerState:
    table = {"status": status, "run": run, "term": term, "server_id": server_id, "link": 1, "host": "h", "round": at}
    return ServerState.model_validate(table)


@dataclass
class Candidate:
    """A server that wants a term."""

    past: Past = field(default_factory=lambda: Past("ledger.sqlite", RUN, 5, KNOWN))
    replace: bool = False
    alone: bool = True
    asked: list[ServerState] = field(default_factory=list)
    took: list[int] = field(default_factory=list)
    clock: VirtualClock = field(default_factory=VirtualClock)

    def __post_init__(self) -> None:
        self.it = Succession(
            "t",
            self.past,
            replace=self.replace,
            alone=self.alone,
            ask=self.asked.append,
            take=self.took.append,
            leave=lambda: None,
            clock=self.clock,
        )

    def finds(self, found: ServerState | None) -> None:
        if found is not None:
            self.it.saw(found, live=False)
        self.it.connected()

    def waits_for_an_answer(self) -> None:
        """Until its time is up, and no longer."""
        self.clock.go(ANSWER_S - 0.01)
        assert self.took == []
        self.clock.go(0.02)


@pytest.mark.parametrize(
    ("found", "above"),
    [
        (None, 0),
        (state("lost"), 2),
        (state("stopped", OTHER, 9), 9),
        (state("finished"), 2),
        (state("lost", OTHER, term=0), 0),
    ],
)
def test_whoever_is_not_online_is_succeeded_at_once(found: ServerState | None, above: int) -> None:
    candidate = Candidate()
    candidate.finds(found)
    assert (candidate.took, candidate.asked) == ([above], [])
    candidate.clock.go(2 * ANSWER_S)
    assert candidate.took == [above]


@pytest.mark.parametrize("found", [state(run=OTHER), state(term=3), state(server_id="c" * 16), state(term=1)])
def test_a_server_of_another_ledger_is_a_rival_unless_replaced(found: ServerState) -> None:
    with pytest.raises(AnotherServer, match=r"a server on host h says that it is online .*start this one with --repl"):
        Candidate().finds(found)
    replacing = Candidate(replace=True)
    replacing.finds(found)
    assert replacing.took == [found.term]


@pytest.mark.parametrize("found", [state(), state(term=1, server_id="a" * 16)])
def test_a_predecessor_is_asked_and_succeeded_where_it_is_silent(found: ServerState) -> None:
    candidate = Candidate()
    candidate.finds(found)
    assert (candidate.took, [asked.status for asked in candidate.asked]) == ([], ["lost"])
    candidate.it.saw(candidate.asked[0], live=True)  # the broker sends it back
    candidate.waits_for_an_answer()
    assert candidate.took == [found.term]


@pytest.mark.parametrize(("found", "alone"), [(state("lost", term=7), True), (state("lost"), False)])
def test_a_lost_server_that_may_come_back_is_given_the_time(found: ServerState, alone: bool) -> None:
    """Our own connection may have pushed it off: on a broker that binds client ids to certificates."""
    candidate = Candidate(alone=alone)
    candidate.finds(found)
    candidate.waits_for_an_answer()
    assert candidate.took == [found.term]

    candidate = Candidate(alone=alone)
    candidate.finds(found)
    candidate.it.disconnected()  # it has come back, and has pushed us off
    with pytest.raises(AnotherServer, match=r"a server on host h says that it is online .*start this one with --repl"):
        candidate.finds(found.model_copy(update={"link": 2}))
    candidate.clock.go(2 * ANSWER_S)
    assert candidate.took == []

    replacing = Candidate(alone=alone, replace=True)
    replacing.finds(found)
    assert replacing.took == [found.term]


def test_a_lost_server_that_stays_lost_is_succeeded_although_the_link_broke_meanwhile() -> None:
    candidate = Candidate()
    candidate.finds(state("lost", term=7))
    candidate.clock.go(0.5 * ANSWER_S)
    candidate.it.disconnected()
    candidate.finds(state("lost", term=7))
    candidate.waits_for_an_answer()
    assert candidate.took == [7]


def test_the_will_of_a_connection_that_was_never_announced_is_no_sign_of_life() -> None:
    """It was killed as it came back: what it said on the connection before stands, until its last will is due."""
    candidate = Candidate()
    candidate.finds(state())
    candidate.it.saw(state("lost").model_copy(update={"link": 2}), live=True)
    candidate.it.disconnected()
    candidate.finds(state("lost").model_copy(update={"link": 2}))
    candidate.waits_for_an_answer()
    assert candidate.took == [2]

    candidate = Candidate()
    candidate.finds(state())
    for link in (2, 3):  # the same, but it is lost once more: it lives
        candidate.it.disconnected()
        lost = state("lost").model_copy(update={"link": link})
        if link == 2:
            candidate.finds(lost)
        else:
            with pytest.raises(AnotherServer):
                candidate.finds(lost)


def test_a_predecessor_that_lives_answers_and_stays() -> None:
    candidate = Candidate()
    candidate.finds(state())
    candidate.it.saw(candidate.asked[0], live=True)
    with pytest.raises(AnotherServer, match="says that it is online"):
        candidate.it.saw(state(), live=True)
    assert candidate.took == []


def test_on_a_new_connection_the_question_is_asked_again() -> None:
    candidate = Candidate()
    candidate.finds(state())
    candidate.it.disconnected()
    candidate.clock.go(2 * ANSWER_S)
    assert candidate.took == []
    candidate.finds(state())  # still retained
    candidate.waits_for_an_answer()
    assert (candidate.took, len(candidate.asked)) == ([2], 2)


@pytest.mark.parametrize(("found", "refused"), [(state("stopped", term=4), True), (state("lost", term=0), False)])
def test_an_empty_ledger_takes_no_run_from_the_broker(found: ServerState, refused: bool) -> None:
    empty = Past("ledger.sqlite", None, 0, frozenset())
    if refused:
        with pytest.raises(
            LedgerError, match="holds no run, but the broker has run 11111111 of host h, which is not finished"
        ):
            Candidate(empty).finds(found)
        replacing = Candidate(empty, replace=True)
        replacing.finds(found)
        assert replacing.took == [4]
    else:
        candidate = Candidate(empty)
        candidate.finds(found)
        assert candidate.took == [0]
