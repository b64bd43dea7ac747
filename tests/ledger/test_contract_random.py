"""Every store answers any sequence of commits alike: SQLite and memory side by side."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from meerkat_mq.core.path import Displacement, short_hash
from meerkat_mq.errors import AnotherServer, LedgerError
from meerkat_mq.ledger.store import Sighting, Store
from meerkat_mq.rounds.records import Judgement, UpdateRecord, Verdict
from meerkat_mq.wire.descriptor import REFUSES
from tests.ledger.stores import NODES, InMemory, InSqlite, Kept, begin, displacement, entry, everything, sent, update

WHO = st.sampled_from([-1, -1, -1, -1, -2, -3])  # which of the servers that have opened the ledger; -1: the newest
AGES = st.integers(0, 3)
SLOTS = st.integers(0, 2)
STATUSES = st.sampled_from(["online", f"{REFUSES}policy.mask"])
BLOBS = [short_hash(blob) for blob in (b"mean", b"of a group", *map(displacement, range(4)), b"\0", b"\1")]


class Both(RuleBasedStateMachine):
    """Up to three servers on one ledger: each commit is made in both worlds, by the same server."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.worlds: list[Kept] = [InSqlite(self.folder), InMemory()]
        self.servers: list[list[Store]] = []

    def teardown(self) -> None:
        for world in self.worlds:
            world.close()
        shutil.rmtree(self.folder)

    @initialize(window=st.sampled_from([0, 2]))
    def start(self, window: int) -> None:
        self.open()
        for store in self.servers[0]:
            begin(store, window)

    @rule()
    def open(self) -> None:
        self.servers = [*self.servers[-2:], [world.open() for world in self.worlds]]
        for store in self.servers[-1]:
            if hasattr(store, "_connection"):  # nothing is torn here: no need to wait for the disk
                store._connection.execute("PRAGMA synchronous = OFF")

    def do(self, who: int, commit: Callable[[Store], object]) -> None:
        """The same answer, or the same refusal."""
        said = []
        for store in self.servers[max(who, -len(self.servers))]:
            try:
                said.append(commit(store))
            except (AnotherServer, LedgerError) as error:
                said.append(type(error))
        assert said[0] == said[1]

    @rule(who=WHO, above=st.integers(0, 20))
    def take_term(self, who: int, above: int) -> None:
        self.do(who, lambda store: store.take_term(above, f"{-who}" * 16, "here"))

    @rule(who=WHO, slot=st.integers(2, 5), node=st.sampled_from(["n2", "n3", "n4"]))
    def commit_slot(self, who: int, slot: int, node: str) -> None:
        self.do(who, lambda store: store.commit_slot(node, slot, store.version))

    @rule(who=WHO, places=st.lists(st.tuples(AGES, SLOTS), max_size=4), loss=st.sampled_from([0.5, 2.0]))
    def commit_updates(self, who: int, places: list[tuple[int, int]], loss: float) -> None:
        self.do(who, lambda store: store.commit_updates(self.records(store, places, loss)))

    @staticmethod
    def records(store: Store, places: list[tuple[int, int]], loss: float) -> list[UpdateRecord]:
        return [update(store.version - age, slot, loss=loss) for age, slot in places if age <= store.version]

    @rule(who=WHO, age=AGES, number=st.integers(0, 3))
    def send_values(self, who: int, age: int, number: int) -> None:
        self.do(who, lambda store: sent(store, max(0, store.version - age), number))

    @rule(who=WHO, number=st.integers(0, 3))
    def keep_blob(self, who: int, number: int) -> None:
        self.do(who, lambda store: store.keep_blob(bytes([number])))

    @rule(
        who=WHO,
        left=st.sets(SLOTS, max_size=1),
        verdict=st.sampled_from(Verdict),
        blob=st.sampled_from([b"", b"mean", b"\1"]),
        judged=st.lists(st.booleans(), max_size=3),
        whole=st.booleans(),
    )
    def close(self, who: int, left: set[int], verdict: Verdict, blob: bytes, judged: list[bool], whole: bool) -> None:
        if whole:
            self.do(who, lambda store: store.commit_updates([update(store.version, slot) for slot in range(3)]))
        waiting = self.servers[-1][0].open_updates()
        taken = [replace(record, verdict=verdict) for record in waiting if record.slot not in left]
        self.do(who, lambda store: self._close(store, taken, blob, judged))

    @staticmethod
    def _close(store: Store, records: list[UpdateRecord], blob: bytes, judged: list[bool]) -> None:
        version = store.version
        added = Displacement(store.keep_blob(blob), len(blob)) if blob else None
        found = {record.node: stopped for record, stopped in zip(records, judged, strict=False)}
        judgements = [Judgement(version, node, 0.5, 0.25, stopped) for node, stopped in found.items()]
        closing = entry(version % 256, displacement=added)
        store.commit_entry(closing, records, 3, overdue=bool(judged), judgements=judgements)

    @rule(who=WHO, version=st.integers(0, 9))
    def keep_snapshot(self, who: int, version: int) -> None:
        self.do(who, lambda store: store.keep_snapshot(version, bytes([version] * 9)))

    @rule(
        who=WHO,
        said=st.lists(st.tuples(st.sampled_from([*NODES, "n3", "x"]), STATUSES), max_size=4),
        seen=st.integers(1, 9),
    )
    def commit_sightings(self, who: int, said: list[tuple[str, str]], seen: int) -> None:
        news = [Sighting(node, seen, "h", status, 5, float(seen), seen, 10 * seen) for node, status in said]
        self.do(who, lambda store: store.commit_sightings(news))

    @rule(
        who=WHO, version=st.integers(0, 3), metrics=st.dictionaries(st.sampled_from("ab"), st.sampled_from([0.5, 1.5]))
    )
    def commit_metrics(self, who: int, version: int, metrics: dict[str, float]) -> None:
        self.do(who, lambda store: store.commit_metrics(version, metrics))

    @rule(who=WHO, fails=st.booleans(), slot=SLOTS, above=st.integers(0, 3))
    def group(self, who: int, fails: bool, slot: int, above: int) -> None:
        def commits(store: Store) -> None:
            with store.group():
                store.commit_updates([update(store.version, slot)])
                store.keep_blob(b"of a group")
                self._close(store, [], b"", [])
                if above:
                    store.take_term(above, f"{-who}" * 16, "here")
                store.commit_updates([update(store.version, slot)])
                if fails:
                    store.commit_updates([update(store.version, slot)])

        self.do(who, commits)

    @invariant()
    def both_hold_the_same(self) -> None:
        for stores in self.servers:
            assert stores[0].in_charge == stores[1].in_charge
        if self.servers:
            inside, memory = (everything(store) for store in self.servers[-1])
            assert inside == memory
            for name in BLOBS:
                assert self.servers[-1][0].blob(name) == self.servers[-1][1].blob(name)


TestBoth: Any = Both.TestCase
TestBoth.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
