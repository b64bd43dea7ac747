"""What the tests of the machines share: settings, events in one line, and machines whose ledger or model answers."""

from collections.abc import Sequence
from typing import Any, TypeVar

from meerkat_mq.config import ServerValuesConfig
from meerkat_mq.core.path import NO_DIGEST, Coefficient, Displacement, Entry, short_hash
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.node import NodeMachine
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import Verdict
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.wire.descriptor import NodeStatus, ServerState
from meerkat_mq.wire.frames import Header, Refusal, Round, Update, Welcome

RUN = bytes(range(16))
MASK = bytes(range(16, 32))
THETA_0 = short_hash(b"theta 0")
SERVER_ID = "5" * 16

_LONG = {"steps": "local_steps", "lanes": "directions"}

Effect = TypeVar("Effect")


def settings(**changes: Any) -> RoundSettings:
    """Two nodes, one lane, T = 1, everybody needed, 100 s, 10 s of grace."""
    plain: dict[str, Any] = {
        "run_id": RUN, "mask_hash": MASK, "count": 10, "steps": 1, "lanes": 1, "lr": 0.5, "eps": 2.0**-10,
        "min_nodes": 2, "min_updates": 1, "fraction": 1.0, "quorum": 1.0, "deadline_s": 100.0, "grace_s": 10.0,
    }  # fmt: skip
    said = {_LONG.get(key, key): value for key, value in (plain | changes).items()}
    if (accept := said.pop("values_accepted", None)) is not None:
        said["values"] = ServerValuesConfig(accept=accept)
    return RoundSettings(**said)


def header(version: int = 0, term: int = 1) -> Header:
    return Header.of(RUN, term, version, MASK)


def only(kind: type[Effect], effects: Sequence[object]) -> list[Effect]:
    return [effect for effect in effects if isinstance(effect, kind)]


def reasons(effects: Sequence[object]) -> list[str]:
    return [count.reason for count in only(e.Count, effects)]


def state(**changes: Any) -> ServerState:
    plain: dict[str, Any] = {
        "status": "online", "run": RUN.hex(), "term": 1, "server_id": SERVER_ID, "link": 1, "host": "here", "round": 0,
    }  # fmt: skip
    return ServerState.model_validate(plain | changes)


# --- the server -----------------------------------------------------------------------------------------------------


def base_after(version: int) -> bytes:
    """The digest that the ledger gives for theta after entry `version`."""
    return short_hash(version.to_bytes(4, "little"))


def status(
    word: str = "online",
    boot: int = 1,
    link: int = 1,
    rows: int = 0,
    run: str | None = None,
    wakes_in_s: int | None = None,
) -> NodeStatus:
    said = {"status": word, "boot": boot, "link": link, "host": "there", "rows": rows}
    return NodeStatus.model_validate(said | {"run": run, "wakes_in_s": wakes_in_s})


class AnsweredServer:
    """A server machine whose ledger answers at once, save for the kinds of effects in `slow`; ⟨g_p, z⟩ is always 1.

    Attributes:
        seen: every effect so far.
        held: effects in `slow`, in order, for `answer`.
    """

    def __init__(self, machine: ServerMachine, *slow: type[object], digest_every: int = 1) -> None:
        self.machine = machine
        self.seen: list[e.ServerEffect] = []
        self.held: list[e.ServerEffect] = []
        self._slow = slow
        self._digest_every = digest_every

    def give(self, event: e.ServerEvent) -> list[e.ServerEffect]:
        """Hand over an event; returns the effects, those that the ledger's answers caused included."""
        return self._work_off(event.now, self.machine.handle(event))

    def _work_off(self, now: float, effects: list[e.ServerEffect]) -> list[e.ServerEffect]:
        done: list[e.ServerEffect] = []
        while effects:
            effect = effects.pop(0)
            done.append(effect)
            if isinstance(effect, self._slow):
                self.held.append(effect)
            elif (answer := self._answer(now, effect)) is not None:
                effects += self.machine.handle(answer)
        self.seen += done
        return done

    def _answer(self, now: float, effect: e.ServerEffect) -> e.ServerEvent | None:
        match effect:
            case e.CommitSlot(node):
                return e.SlotCommitted(now, node)
            case e.CommitUpdate(record):
                return e.UpdatesCommitted(now, (record,))
            case e.FetchValues(node, update):
                return e.ValuesFetched(now, node, update, Verdict.ACCEPTED)
            case e.JudgeRound(term, version, records, judge):
                return e.RoundJudged(now, term, version, judge(records))
            case e.ApplyTerms(version, _, shares):
                due = (version + 1) % self._digest_every == 0
                digest = base_after(version) if due else NO_DIGEST
                return e.TermsApplied(now, version, digest, Displacement(short_hash(b"mean"), 9) if shares else None)
            case e.CommitEntry():
                return e.EntryCommitted(now, effect)
            case e.MeasureDirections(version, lanes, steps):
                return e.DirectionsMeasured(now, version, ((1.0,) * steps,) * lanes)
        return None

    def answer(self, now: float) -> list[e.ServerEffect]:
        """Let the ledger answer what it held back."""
        held, self.held = self.held, []
        events = [self._answer(now, effect) for effect in held]
        return [effect for event in events if event is not None for effect in self.give(event)]

    def start(self, now: float = 0.0) -> list[e.ServerEffect]:
        return self._work_off(now, self.machine.start(now))

    def born(self, now: float, *nodes: str, **what: Any) -> list[e.ServerEffect]:
        return [effect for node in nodes for effect in self.give(e.StatusCame(now, node, status(**what)))]

    def gone(self, now: float, node: str, word: str = "lost", link: int = 1) -> list[e.ServerEffect]:
        return self.give(e.StatusCame(now, node, status(word, link=link)))

    def tick(self, now: float) -> list[e.ServerEffect]:
        return self.give(e.Tick(now))

    def update(self, now: float, node: str, *scalars: float, **changes: Any) -> list[e.ServerEffect]:
        """An update for the present version with the right base; `changes` replace fields, `term` and `version` too."""
        version = changes.pop("version", self.machine.version)
        at, base = header(version, changes.pop("term", 1)), base_after(version - 1) if version else THETA_0
        fields: dict[str, Any] = {"header": at, "boot": 1, "base": base[:8], "loss": 1.0, "scalars": scalars or (1.0,)}
        if "values" in changes:
            fields["scalars"] = ()
        return self.give(e.UpdateCame(now, node, Update(**fields | changes)))

    @property
    def round(self) -> Round:
        """The round as last published."""
        return only(e.PublishRound, self.seen)[-1].frame

    @property
    def entries(self) -> list[e.CommitEntry]:
        return only(e.CommitEntry, self.seen)


def answered_server(
    *slow: type[object], digest_every: int = 1, resume: dict[str, Any] | None = None, **changes: Any
) -> AnsweredServer:
    """A started server machine whose ledger answers; `resume` goes to the machine, `changes` to the settings."""
    fields: dict[str, Any] = {"term": 1, "server_id": SERVER_ID, "base": THETA_0} | (resume or {})
    made = AnsweredServer(
        ServerMachine(settings(digest_every=digest_every, **changes), **fields), *slow, digest_every=digest_every
    )
    made.start()
    return made


# --- a node ---------------------------------------------------------------------------------------------------------


def node_machine(**more: Any) -> NodeMachine:
    return NodeMachine(run_id=RUN, mask_hash=MASK, base=THETA_0, boot=1, now=0.0, **more)


def chain(count: int, *, seed: int = 0, start: int = 0, previous: bytes = MASK) -> list[Entry]:
    """Entries in a row; another seed tells another past."""
    entries: list[Entry] = []
    for version in range(start, start + count):
        entries.append(Entry(version, (Coefficient(0, 0, float(seed + 1)),), previous, base_after(version)))
        previous = entries[-1].hash(RUN)
    return entries


def announced(version: int = 0, *, term: int = 1, asked: Sequence[int] = (0,), **changes: Any) -> Round:
    fields: dict[str, Any] = {
        "header": header(version, term), "is_open": True, "steps": 1, "lanes": 1, "eps": 2.0**-10,
        "deadline_ms": 1000, "asked": frozenset(asked),
    }  # fmt: skip
    return Round(**fields | changes)


def welcome(slot: int = 0, term: int = 1, boot: int = 1) -> Welcome:
    return Welcome(header(0, term), boot, slot)


def refusal(reason: Any, version: int = 0, boot: int = 1) -> Refusal:
    return Refusal(header(version), boot, reason)


class AnsweredNode:
    """A node machine whose theta takes entries at once and arrives where they say; steps wait for `step`."""

    def __init__(self, **more: Any) -> None:
        self.machine = node_machine(**more)
        self.seen: list[e.NodeEffect] = []
        self.task: e.StartSteps | None = None

    def give(self, event: e.NodeEvent) -> list[e.NodeEffect]:
        """Hand over an event; returns the effects, those of applied entries included."""
        effects, done = self.machine.handle(event), list[e.NodeEffect]()
        while effects:
            effect = effects.pop(0)
            done.append(effect)
            if isinstance(effect, e.ApplyEntries):
                digests = tuple(entry.digest for entry in effect.entries)
                effects += self.machine.handle(e.EntriesApplied(event.now, effect.entries, digests))
            elif isinstance(effect, e.StartSteps):
                self.task = effect
        self.seen += done
        return done

    def frames(self, now: float, *frames: Any) -> list[e.NodeEffect]:
        return [effect for frame in frames for effect in self.give(e.FrameCame(now, frame))]

    def step(self, now: float, *scalars: float) -> list[e.NodeEffect]:
        """The local steps asked for are done."""
        assert self.task is not None
        task, self.task = self.task, None
        return self.give(e.StepsDone(now, task.version, scalars or (1.0,), 1.0))


def answered_node(*frames: Any, **more: Any) -> AnsweredNode:
    """A connected and welcomed node that has seen these frames; `more` goes to the machine."""
    made = AnsweredNode(**more)
    made.give(e.ServerCame(0.0, state()))
    made.frames(0.0, welcome(), *frames)
    return made


def sent(effects: Sequence[object], kind: type[Effect]) -> list[Effect]:
    """The frames of one type among what a node sends."""
    return only(kind, [send.frame for send in only(e.Send, effects)])
