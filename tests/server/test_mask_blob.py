"""A run goes on under a server that compresses its mask to other bytes: the chunks get a name of their own."""

import json
from pathlib import Path

import pytest

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.path import short_hash
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.server.run import prepare_run
from tests.ledger.ledgers import alter, begin_chain_again
from tests.server.federation import PACE, Federation
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(150)


def as_begun_elsewhere(folder: Path) -> None:
    """Have a ledger say that its run began with a mask blob that was a byte longer."""
    ledger = Ledger.read(folder / LEDGER_FILE)
    assert ledger.run is not None
    table = json.loads(ledger.run.model_dump_json())
    ledger.close()
    alter(folder, "UPDATE run SET descriptor = ?", json.dumps(table | {"mask_bytes": table["mask_bytes"] + 1}))
    begin_chain_again(folder)


def test_the_chunks_have_the_name_of_the_mask_unless_its_bytes_differ_from_the_beginning(tmp_path: Path) -> None:
    config = ServerConfig(federation="f", state_dir=tmp_path, engine="toy", toy_weights=50_000)
    first = prepare_run(config)
    assert first.descriptor.mask_blob is None
    assert {chunk.blob for chunk in first.chunks} == {first.mask.hash}
    begun = first.descriptor.model_copy(update={"mask_bytes": len(first.blob) + 1})
    later = prepare_run(config, begun)
    assert later.descriptor.mask_name == short_hash(later.blob) != later.mask.hash
    assert {chunk.blob for chunk in later.chunks} == {short_hash(later.blob)}
    assert prepare_run(config, first.descriptor).descriptor == first.descriptor


async def test_a_new_node_gets_the_mask_of_an_upgraded_server(federation: Federation) -> None:
    rounds = PACE | {"deadline_s": 5.0}
    old, first = federation.node("old"), federation.server(rounds=rounds)
    await federation.eye.reaches(3)
    first.stop()
    assert await first.ended() == 0
    as_begun_elsewhere(federation.folder / "server")
    federation.server(rounds=rounds)
    await federation.eye.follows(2)
    new = federation.node("new")
    await new.says("ready")
    assert federation.eye.runs[-1].mask_blob is not None
    version = federation.eye.version
    await until(lambda: federation.eye.statuses["new"][-1].version > version, within_s=60)
    assert not old.said("message dropped")
    assert len(old.said("ready")) == 1
