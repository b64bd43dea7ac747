"""Ledgers without a server: what one would have written, by a small pure loop."""

import random
import sqlite3
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from meerkat_mq.config import Codec, EarlyStoppingConfig, GuardsConfig, RoundsConfig, Rules, ServerValuesConfig
from meerkat_mq.core.gradip import inner_products
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Displacement, Entry, short_hash
from meerkat_mq.core.replica import Replica
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.ledger.displacement import mean_of, measured
from meerkat_mq.ledger.files import DIFFERENCE_FILE, snapshot_file
from meerkat_mq.ledger.run import settings_of
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.ledger.sqlite_chain import add_all
from meerkat_mq.ledger.store import Sighting, Store
from meerkat_mq.rounds.early_stopping import EarlyStopping, judgements_of, with_verdicts
from meerkat_mq.rounds.guards import Guard
from meerkat_mq.rounds.policy import shares_of, terms_of
from meerkat_mq.rounds.records import Judgement, UpdateRecord, Verdict
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.frames import encode_entry
from meerkat_mq.wire.messages import Values
from meerkat_mq.wire.snapshot import Difference, encode_snapshot
from meerkat_mq.wire.values import encode_values

RUN = bytes(range(16))
WEIGHTS = 40
OPEN: list[Store] = []
VALUES = {Verdict.NOT_FINITE: float("nan"), Verdict.TOO_LARGE: 3e38}


@dataclass
class Writer:
    """Writes a run into `folder`, round by round.

    Attributes:
        absent: (version, slot) of updates that do not come.
        refused: (version, slot) of updates that are refused, and why.
        max_staleness: of a buffered run; 0: a synchronous one.
        ages: (version, slot) of updates that are from an older theta, and how much older.
        partial: (version, slot) of updates that are partial paths, and how many steps they have.
        values: slots of values nodes, and their codecs.
        measures: whether displacements are measured in a run with the clipped mean, as older servers did not.
        store: gets it all; default: `ledger.sqlite` in the folder.
    """

    folder: Path
    count: int = 6
    nodes: int = 3
    lanes: int = 1
    steps: int = 1
    perturbations: int = 1
    digest_every: int = 1
    weigh_by_rows: bool = False
    aggregate: Literal["clipped-mean", "mean", "trimmed-mean"] = "mean"
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    mask: Mask = field(default_factory=lambda: toy_mask(WEIGHTS))
    engine: str = "toy"
    absent: Collection[tuple[int, int]] = ()
    refused: Mapping[tuple[int, int], Verdict] = field(default_factory=dict)
    max_staleness: int = 0
    ages: Mapping[tuple[int, int], int] = field(default_factory=dict)
    partial: Mapping[tuple[int, int], int] = field(default_factory=dict)
    values: Mapping[int, Codec] = field(default_factory=dict)
    measures: bool = True
    store: Store | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rounds = RoundsConfig(
            count=self.count, min_nodes=self.nodes, directions=self.lanes, local_steps=self.steps, lr=2.0,
            perturbations=self.perturbations,
            digest_every=self.digest_every, weigh_by_rows=self.weigh_by_rows, aggregate=self.aggregate,
            mode="buffered" if self.max_staleness else "synchronous", max_staleness=self.max_staleness or 20,
        )  # fmt: skip
        values = ServerValuesConfig(accept=bool(self.values))
        self.codec = values.codec
        self.run = descriptor(self.mask, rounds, self.engine, accept=values.accept)
        rules = Rules(rounds=rounds, guards=GuardsConfig(), early_stopping=self.early_stopping, values=values).kept
        self.settings = settings_of(self.run, rules, measured=bool(self.mask.g_p.any()))
        self.early = EarlyStopping(self.settings)
        self.guard = Guard(self.settings.guards, self.lanes, cumulative=True) if self.settings.clips else None
        self.judgements: list[tuple[Judgement, ...]] = []
        self.replica = Replica(self.mask, run_id=RUN, stream=self.run.stream, digest_every=self.digest_every)
        self.entries: list[Entry] = []
        self.ledger = Ledger.open(self.folder / LEDGER_FILE) if self.store is None else self.store
        OPEN.append(self.ledger)
        self.ledger.begin(self.run, rules)
        self.ledger.take_term(0, "5" * 16, "here")
        for slot in range(self.nodes):
            self.ledger.commit_slot(f"n{slot}", slot, 0)

    @property
    def head(self) -> bytes:
        return self.entries[-1].hash(RUN) if self.entries else self.mask.hash

    def records(self, version: int) -> tuple[UpdateRecord, ...]:
        """What closes with an entry."""
        came = [self._record(version, slot) for slot in range(self.nodes) if (version, slot) not in self.absent]
        return tuple(sorted(came, key=lambda record: (record.version, record.slot)))

    def displacement(self, version: int, slot: int) -> bytes:
        """What a values node sends for an entry."""
        drawn = np.random.default_rng(1000 * version + slot).normal(0, 0.01, self.mask.size)
        return encode_values(drawn.astype(np.float32), self.values[slot])

    def _record(self, version: int, slot: int) -> UpdateRecord:
        draw = random.Random(1000 * version + slot)
        verdict = self.refused.get((version, slot), Verdict.ACCEPTED)
        base = version - self.ages.get((version, slot), 0)
        asked = self.partial.get((version, slot), self.early.steps_of(base, f"n{slot}"))
        scalars = [float(np.float32(draw.gauss(0, 1))) for _ in range(self.perturbations * asked)]
        scalars[0] = VALUES.get(verdict, scalars[0])
        scalars = [float(np.float32(value)) for value in scalars]
        weight = draw.randrange(1, 100) if self.weigh_by_rows else 1
        loss = float(np.float32(1 + draw.random()))
        if slot not in self.values:
            return UpdateRecord(base, f"n{slot}", slot, 7, weight, tuple(scalars), loss, verdict)
        blob = self.displacement(version, slot)
        values = Values(short_hash(blob), len(blob), asked)
        return UpdateRecord(base, f"n{slot}", slot, 7, weight, (), loss, verdict, values)

    def hear(self) -> tuple[UpdateRecord, ...]:
        """The updates of the open round come."""
        version = len(self.entries)
        records = self.records(version)
        for record in records:
            if record.values is not None:
                self.ledger.keep_blob(self.displacement(version, record.slot))
        self.ledger.commit_updates(records)
        return records

    def round(self) -> None:
        """The open round is heard and closes."""
        version, heard = len(self.entries), self.hear()
        products = self.products(version)
        if self.guard is not None:
            load = partial(self.ledger.values, weights=self.mask.size)
            came = measured(heard, load, self.settings) if self.measures else heard
            heard = self.guard.judge(came)
            self.guard.remember(heard)
        judgements = judgements_of(version, heard, products, self.settings)
        records = with_verdicts(heard, judgements)
        terms, added = terms_of(records, self.settings, version), self._mean(records, version)
        ((_, values),) = self.ledger.changes([Entry(version, terms, b"", b"", added)], self.mask.size)
        entry = Entry(version, terms, self.head, self.replica.apply(terms, values), added)
        self.ledger.commit_entry(
            entry, records, self.nodes, overdue=len(records) < self.nodes, products=products, judgements=judgements
        )
        self.entries.append(entry)
        self.judgements.append(judgements)
        self.early.remember(judgements)

    def _mean(self, records: tuple[UpdateRecord, ...], version: int) -> Displacement | None:
        """Of the displacements among the records; it is kept."""
        shares = shares_of(records, self.settings, version)
        if not shares:
            return None
        blob = encode_values(mean_of(shares, self.ledger, self.mask.size), self.codec)
        return Displacement(self.ledger.keep_blob(blob), len(blob))

    def products(self, version: int) -> tuple[tuple[float, ...], ...]:
        """⟨g_p, z⟩ of a round's directions, where the mask has a g_p."""
        if not self.settings.measured:
            return ()
        steps = self.perturbations * self.settings.steps_of(version)
        return inner_products(self.mask.g_p, RUN, version, lanes=self.lanes, steps=steps, stream=self.run.stream)

    def snapshot(self) -> Path:
        """Keep theta as it stands."""
        blob = encode_snapshot(RUN, self.replica.version, self.head, self.replica.theta)
        self.ledger.keep_snapshot(self.replica.version, blob)
        return snapshot_file(self.folder, self.replica.version)

    def difference(self) -> Path:
        """Leave the model as it stands."""
        file = self.folder / DIFFERENCE_FILE
        Difference(self.mask, self.replica.theta, RUN, self.replica.version).save(file)
        return file

    def see(self, slot: int, status: str, seen: float) -> None:
        """A node said where it stands."""
        self.ledger.commit_sightings([Sighting(f"n{slot}", 7, "there", status, 50, seen, 3, 264)])


def write(folder: Path, **what: Any) -> Writer:
    """A whole run; its ledger is closed."""
    writer = Writer(folder, **what)
    for _ in range(writer.count):
        writer.round()
    writer.ledger.close()
    return writer


def descriptor(mask: Mask, rounds: RoundsConfig, engine: str, *, accept: bool = False) -> RunDescriptor:
    fields = {
        "federation": "f", "run": RUN.hex(), "engine": engine, "model": "", "dtype": "float32",
        "fingerprint": mask.fingerprint.hex(), "tokenizer": mask.tokenizer_fingerprint.hex(), "mask": mask.hash.hex(),
        "mask_bytes": 1, "mask_chunks": 1, "weights": mask.size, "values": accept,
    }  # fmt: skip
    return RunDescriptor.model_validate(fields | rounds.spec)


def alter(folder: Path, statement: str, *values: object) -> None:
    """Change a ledger behind everybody's back; it must change something."""
    with closing(sqlite3.connect(folder / LEDGER_FILE)) as connection, connection:
        assert connection.execute(statement, values).rowcount > 0


def begin_chain_again(folder: Path) -> None:
    """Let a ledger's chain be one of what it holds now."""
    with closing(sqlite3.connect(folder / LEDGER_FILE)) as connection, connection:
        connection.execute("DELETE FROM chain")
        add_all(connection)


def alter_entry(folder: Path, version: int, entry: Entry) -> None:
    alter(folder, "UPDATE entries SET entry = ? WHERE version = ?", encode_entry(entry), version)


def close_all() -> None:
    """At the end of a test."""
    while OPEN:
        OPEN.pop().close()


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
