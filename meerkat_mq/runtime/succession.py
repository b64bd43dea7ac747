"""Taking charge of a federation: what the broker still says of servers before, and whether one of them lives.

After a power cut, the broker goes on saying for a while that the server is online which is no more: until its will is
due, or for ever, if the broker went down with it. Whether such a state is of a process that lives is asked. Who
lives puts right what stands on its topic (docs/ledger.md), so the server publishes there, not retained, what the
broker would say at its death. Where no answer comes, it was a predecessor.

A death may mislead too. A broker that binds client ids to certificates closes a server's connection when another server
connects with its certificate, and publishes its will: so a second server finds every first one lost. Unless that was
this ledger's, and no other process uses the ledger, the first one is given the time to come back. Then it pushes this
one off in turn, and is found lost again, on another link: it lives.

Safety needs none of this: a term fences whoever had an earlier one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import structlog

from meerkat_mq.errors import AnotherServer, LedgerError, MeerkatError, RunMismatch
from meerkat_mq.ledger.store import Store
from meerkat_mq.rounds.server_state import HIGHEST_TERM
from meerkat_mq.runtime.ports import Clock, Timer
from meerkat_mq.wire.descriptor import ServerState

ANSWER_S = 5.0  # in which a server that lives answers, also over a slow link


@dataclass(frozen=True, slots=True)
class Past:
    """What a ledger held when its server started."""

    ledger: str  # its file
    run: str | None  # hex; None where it held none
    version: int  # where it ended
    ranks: frozenset[tuple[int, str]]  # (term, server id) of each server that took a term

    @classmethod
    def of(cls, ledger: Store) -> Self:
        """What a ledger holds now; blocks."""
        run = ledger.run
        ranks = frozenset((term.term, term.server_id) for term in ledger.terms())
        return cls(ledger.where, run.run if run else None, ledger.version, ranks)


class Succession:
    """Decides, at each connection until this server has a term, whether it may take one.

    Args:
        topic: of the servers' state.
        replace: whether to take over from whoever is there.
        alone: whether no other process uses this server's ledger.
        ask: publishes a state there, not retained.
        take: takes a term above the one that it is given.
        leave: called before an error is raised: whoever may not take charge leaves what stands on the topics as it is.
    """

    def __init__(
        self,
        topic: str,
        past: Past,
        *,
        replace: bool,
        alone: bool,
        ask: Callable[[ServerState], None],
        take: Callable[[int], None],
        leave: Callable[[], None],
        clock: Clock,
    ) -> None:
        self._topic = topic
        self._past = past
        self._replace = replace
        self._alone = alone
        self._ask = ask
        self._take = take
        self._leave = leave
        self._found: ServerState | None = None
        self._asked: ServerState | None = None
        self._clock = clock
        self._no_answer: Timer | None = None
        self._log = structlog.get_logger()

    def saw(self, state: ServerState, *, live: bool) -> None:
        """A state stands on the topic, `live` if published just now. AnotherServer: the predecessor answers."""
        self._found = state
        if live and self._asked is not None and state.status == "online":
            raise self._another(state)

    def connected(self) -> None:
        """A connection stands, and what was retained has been seen: take a term, or ask first.

        Raises:
            AnotherServer: a server is there that this one does not succeed.
            LedgerError: the broker knows of a run that is not finished, and the ledger holds none.
            RunMismatch: there is no term left.
        """
        found = self._found
        if found is not None and not self._replace:
            self._consider(found)
        if self._asked is not None:
            self._question(self._asked)
        else:
            self._succeed(found)

    def _consider(self, found: ServerState) -> None:
        """Refuse where another server lives; ask where it may."""
        ours = found.run == self._past.run and found.rank in self._past.ranks
        if self._asked is not None:
            if found.status == "lost" and found.term > 0 and found.link != self._asked.link:
                if self._asked.status == "lost":
                    raise self._another(found)  # it has connected since
                self._asked = found  # its last connection may have ended before it said so: what comes next tells
        elif found.status == "online":
            if not ours:
                raise self._another(found)
            self._asked = found
        elif found.status == "lost" and found.term > 0 and not (ours and self._alone):
            self._asked = found

    def disconnected(self) -> None:
        """No answer can come; the next connection asks again."""
        if self._no_answer is not None:
            self._no_answer.cancel()

    def _question(self, state: ServerState) -> None:
        self._log.warning(
            "asking whether the server before this one lives", term=state.term, host=state.host, wait_s=ANSWER_S
        )
        self._no_answer = self._clock.at(self._clock.now() + ANSWER_S, lambda: self._succeed(self._asked))
        self._ask(state.model_copy(update={"status": "lost"}))

    def _succeed(self, found: ServerState | None) -> None:
        if found is not None:
            self._check(found)
        self._take(found.term if found else 0)

    def _check(self, found: ServerState) -> None:
        """Refuse where there is no term left, or a run would be lost; say what a ledger from a backup lost."""
        past = self._past
        if found.term >= HIGHEST_TERM:
            remedy = "clear this retained message on the broker"
            raise self._refused(RunMismatch(self._topic, "the last possible terms stand there", remedy))
        # a server that ended before it had a term left the run that it would have begun, under term 0
        if past.run is None and found.status != "finished" and found.term > 0 and not self._replace:
            problem = (
                f"holds no run, but the broker has run {found.run[:8]} of host {found.host}, which is not finished"
            )
            remedy = "put back its ledger, with its -wal file; for a new run in its place, start with --replace"
            raise self._refused(LedgerError(past.ledger, problem, remedy))
        if past.run == found.run and (found.term > max(past.ranks, default=(0, ""))[0] or found.round > past.version):
            self._log.warning(
                "this ledger is older than the run that the broker knows: rounds since are lost",
                ledger=past.ledger, round=past.version, broker_round=found.round, broker_term=found.term,
            )  # fmt: skip

    def _another(self, state: ServerState) -> MeerkatError:
        problem = f"a server on host {state.host} says that it is online (term {state.term}, run {state.run[:8]})"
        return self._refused(AnotherServer(self._topic, problem, "stop it, or start this one with --replace"))

    def _refused(self, error: MeerkatError) -> MeerkatError:
        self._leave()
        return error
