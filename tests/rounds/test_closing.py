"""A round is judged off the event loop: what happens between the question and the answer."""

from dataclasses import replace

from meerkat_mq.rounds import events as e
from tests.rounds.support import AnsweredServer, answered_server, only, reasons


def closing() -> tuple[AnsweredServer, e.JudgeRound]:
    """A server that waits for the outcome of round 0, of a and b."""
    server = answered_server(e.JudgeRound)
    server.born(0.0, "a", "b")
    server.update(1.0, "a", 2.0)
    server.update(1.0, "b", 4.0)
    (order,) = server.held
    assert isinstance(order, e.JudgeRound)
    return server, order


def judged(order: e.JudgeRound) -> e.RoundJudged:
    return e.RoundJudged(2.0, order.term, order.version, order.judge(order.records))


def test_the_answer_leads_to_the_entry() -> None:
    server, order = closing()
    assert server.entries == []
    server.give(judged(order))
    assert [term.coefficient for term in server.entries[0].entry.terms] == [1.5]  # lr · (2 + 4) / 2
    assert server.machine.version == 1


def test_an_answer_to_another_term_or_version_or_a_second_one_is_dropped() -> None:
    server, order = closing()
    answer = judged(order)
    assert reasons(server.give(replace(answer, term=2))) == ["unexpected answer"]
    assert reasons(server.give(replace(answer, version=1))) == ["unexpected answer"]
    assert server.entries == []
    server.give(answer)
    assert reasons(server.give(answer)) == ["unexpected answer"]
    assert len(server.entries) == 1


def test_an_answer_that_nobody_waits_for_is_dropped() -> None:
    _, order = closing()
    waiting, fresh = answered_server(), answered_server()
    waiting.born(0.0, "a", "b")
    for server in (waiting, fresh):
        assert reasons(server.give(judged(order))) == ["unexpected answer"]
        assert only(e.ApplyTerms, server.seen) == []


def test_what_is_committed_meanwhile_is_not_of_the_round() -> None:
    server = answered_server(e.JudgeRound, e.CommitUpdate, quorum=0.5)
    server.born(0.0, "a", "b")
    server.update(1.0, "a", 2.0)
    server.answer(1.0)
    server.update(99.0, "b", 4.0)
    server.tick(100.0)  # the deadline, with one of two committed
    late, order = server.held
    assert isinstance(order, e.JudgeRound)
    assert isinstance(late, e.CommitUpdate)
    assert reasons(server.give(e.UpdatesCommitted(101.0, (late.record,)))) == ["late"]
    assert server.tick(300.0) == []
    assert reasons(server.give(judged(order))) == []
    assert [record.node for record in server.entries[0].records] == ["a"]
