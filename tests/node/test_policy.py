"""A hostile server, or a broker's owner, against `python -m meerkat_mq.node` with the policy that is shipped."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import tomli_w

from meerkat_mq.core import metrics as m
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.core.path import short_hash
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.errors import BadValue
from meerkat_mq.ledger.inspect import run_shown
from meerkat_mq.wire.arrays import decode_mask, encode_array, encode_mask
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.frames import encode
from meerkat_mq.wire.messages import Header, Round
from tests.server.federation import NAME, TOPICS, Federation
from tests.support.command import Meerkat
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(300)  # the first import of torch takes long on a busy machine

REST_MIB = 60.0
ROUNDS = {"count": 6, "min_updates": 1, "deadline_s": 60.0, "lr": 0.05}


def leaking_mask(model: Path) -> Mask:
    """One weight of each token's embedding: legal, and theta_0 and fingerprints are the model's own (H12)."""
    from meerkat_mq.engines.torch.load import load_model

    loaded = load_model(model)
    name = "model.embed_tokens.weight"
    weight = dict(loaded.model.named_parameters())[name].numpy()
    indices = np.arange(0, weight.size, weight.shape[1], dtype=np.uint32)
    matrix = MaskedMatrix(name, weight.shape, indices, weight.flatten()[indices], np.zeros(len(indices), np.float32))
    return Mask((matrix,), loaded.fingerprint, loaded.tokenizer_fingerprint)


def private_node(federation: Federation, model: Path, **settings: Any) -> Any:
    """A node of a language model, with private rows, and the policy that is shipped."""
    rows = federation.folder / "private.jsonl"
    rows.write_text(
        "".join(json.dumps({"sentence": f"the {n} pump is fine", "label": n % 2}) + "\n" for n in range(20))
    )
    return federation.node("a", model=str(model), data="private.jsonl", threads=1, **settings)


async def hostile_server(federation: Federation, model: Path, **rounds: Any) -> Any:
    """The shipped server with a mask that leaks, batch 1, and 1,000 perturbations."""
    leaking_mask(model).save(federation.folder / "leak.mkm")
    table = {"batch_size": 1, "perturbations": 1000} | ROUNDS | rounds
    server = federation.server(rounds=table, engine="transformers", task="sst2", mask="leak.mkm")
    await until(lambda: federation.eye.runs)
    return server


async def said_by(federation: Federation, node: str = "a") -> str:
    """What a node says to the server of why it takes no part."""

    def last() -> str | None:
        statuses = federation.eye.statuses.get(node)
        return statuses[-1].refuses if statuses else None

    await until(last, within_s=120.0)
    return last() or ""


async def test_a_mask_that_reads_rows_is_refused_and_both_sides_say_so(
    mosquitto: Mosquitto, tmp_path: Path, tiny_llama: Path, meerkat: Meerkat
) -> None:
    """H12, at its mildest: the batch and the perturbations are like those of an honest server."""
    async with Federation(tmp_path, mosquitto.config, models=True) as federation:
        server = await hostile_server(federation, tiny_llama, batch_size=16, perturbations=1)
        node = private_node(federation, tiny_llama)
        said = await said_by(federation)
        words = "the run's mask holds model.embed_tokens.weight, of the kind embedding; this node takes linear"
        assert said == f"policy.kinds: {words}"
        (line,) = node.said("the run is refused")
        assert line["problem"].startswith(said)
        warned = await server.says("a node refuses the run", node="a")
        assert warned["problem"] == said

        def shown() -> Any:
            with federation.ledger() as ledger:
                return run_shown(ledger)

        await until(lambda: shown().nodes)
        assert [(row.node, row.slot, row.status) for row in shown().nodes] == [("a", None, f"refuses: {said}")]
        assert shown().counts[m.REFUSES] == 1
        assert not node.over  # and no update left it
        assert federation.eye.version == 0
        status = meerkat("status", tmp_path / "server").out
    assert "policy.kinds" in status
    assert f"{m.REFUSES}: 1" in status


@pytest.mark.parametrize(
    ("policy", "rounds", "key"),
    [
        ({}, {}, "min_batch"),
        ({"kinds": ["linear", "embedding"], "min_batch": 8}, {"batch_size": 8}, "max_directions"),
    ],
)
async def test_the_attack_as_it_was_is_refused_by_other_keys_too(
    mosquitto: Mosquitto, tmp_path: Path, tiny_llama: Path, policy: dict[str, Any], rounds: dict[str, Any], key: str
) -> None:
    """H12 with batch 1; then with a policy that was opened by hand, 1,000 directions of one batch of 8."""
    async with Federation(tmp_path, mosquitto.config, models=True) as federation:
        server = await hostile_server(federation, tiny_llama, **rounds)
        node = private_node(federation, tiny_llama, policy=policy)
        assert (await said_by(federation)).startswith(f"policy.{key}: ")
        await server.says("a node refuses the run", node="a")
        assert not node.over
        assert federation.eye.version == 0


def bomb(weights: int) -> tuple[bytes, bytes]:
    """A mask of zeros that is small on the wire (H13); its blob and its hash."""
    zeros = np.zeros(weights, np.float32)
    head = toy_mask(10).to_bytes()
    size = len(head) - 120
    record = head[:size].replace((10).to_bytes(4, "little"), weights.to_bytes(4, "little"))
    gaps = np.ones(weights, np.uint32)
    gaps[0] = 0
    blob = b"".join([
        len(record).to_bytes(4, "little"), weights.to_bytes(4, "little"), record,
        encode_array(gaps), encode_array(zeros), encode_array(zeros),
    ])  # fmt: skip
    return blob, short_hash(blob)


async def describe(federation: Federation, descriptor: RunDescriptor) -> None:
    await federation.eye.session.publish(TOPICS.run, descriptor.encode(), retain=True)


def descriptor(mask: Mask, **changes: Any) -> RunDescriptor:
    blob = encode_mask(mask)
    return RunDescriptor.model_validate({
        "federation": NAME, "run": "1" * 32, "engine": "toy", "model": "", "dtype": "float32",
        "fingerprint": "0" * 64, "tokenizer": "0" * 64, "mask": mask.hash.hex(), "mask_bytes": len(blob),
        "mask_chunks": -(-len(blob) // 65536), "weights": mask.size, "stream": "mk1", "rounds": 100, "local_steps": 1,
        "directions": 1, "lr": 0.1, "eps": 0.1, "batch_size": 16, "digest_every": 1, **changes,
    })  # fmt: skip


async def test_a_mask_bomb_is_neither_fetched_nor_decoded(mosquitto: Mosquitto, tmp_path: Path) -> None:
    """H13: 24 kB that decode to 805 MB; then the node takes part in the next run, of an honest server."""
    async with Federation(tmp_path, mosquitto.config) as federation:
        await describe(federation, descriptor(toy_mask(10), weights=2**26, mask_bytes=24_756, rounds=1000))
        node = federation.node("a")
        said = await said_by(federation)
        assert said == "policy.max_weights: weights in the run's mask: 67,108,864 is more than this node's 4,194,304"
        assert "a" not in federation.eye.wants
        before = psutil.Process(node.pid).memory_info().rss
        assert before < 250 * 2**20

        server = federation.server(rounds=ROUNDS)
        await server.says("round closed", times=6)
        assert federation.eye.statuses["a"][-1].refuses is None
        assert psutil.Process(node.pid).memory_info().rss < before + REST_MIB * 2**20


def test_a_blob_with_more_weights_than_the_run_says_is_refused_before_it_is_decoded() -> None:
    blob, name = bomb(100_000)
    with pytest.raises(BadValue, match="has 100000 weights, expected 10"):
        decode_mask(blob, name, 10)


@pytest.mark.parametrize("change", [{"eps": 1e9}, {"eps": 1e-30}, {"lr": 1e6}, {"batch_size": 65536}])
async def test_a_forged_descriptor_is_refused_and_the_node_stays_for_the_next_run(
    mosquitto: Mosquitto, tmp_path: Path, change: dict[str, float]
) -> None:
    """H20, as far as a policy goes."""
    (key,) = change
    async with Federation(tmp_path, mosquitto.config) as federation:
        await describe(federation, descriptor(toy_mask(10), **change))
        node = federation.node("a")
        limit, what = (
            f"m{'in' if change[key] < 1 else 'ax'}_{key}".removesuffix("_size"),
            {"batch_size": "rows of a batch"},
        )
        assert (await said_by(federation)).startswith(f"policy.{limit}: {what.get(key, key)}: ")
        server = federation.server(rounds=ROUNDS)
        await server.says("round closed", times=6)
        assert not node.over


@pytest.mark.parametrize("eps", [2.0**100, 2.0**-40])
async def test_a_forged_round_is_refused_and_the_run_goes_on(mosquitto: Mosquitto, tmp_path: Path, eps: float) -> None:
    """H20: the owner of the broker puts rounds with an eps of its own among those of the server."""
    async with Federation(tmp_path, mosquitto.config) as federation:
        server = federation.server(rounds=ROUNDS | {"count": 1000, "min_nodes": 2})
        node = federation.node("a")
        await until(lambda: [one for one in federation.eye.statuses.get("a", []) if one.status == "online"])
        run = federation.eye.runs[-1]
        term = federation.eye.states[-1].term
        header = Header.of(run.run_id, term, 0, run.mask_hash)
        forged = encode(Round(header, True, 1, 1, eps, 1000, asked=frozenset({0})))
        await federation.retain("round", forged)
        assert (await said_by(federation)).startswith("policy.m")
        for other in ("b", "c"):
            federation.node(other)
        await server.says("round closed", times=3)
        assert not node.over


async def test_masks_without_end_are_fetched_for_a_days_bytes_and_both_sides_say_so(
    mosquitto: Mosquitto, tmp_path: Path, meerkat: Meerkat
) -> None:
    honest = descriptor(toy_mask(10))
    async with Federation(tmp_path, mosquitto.config) as federation:
        limits = {"max_day_bytes": 2 * honest.mask_bytes, "min_batch": 1}
        for number in range(1, 4):
            name = f"{number:032x}"
            await describe(federation, honest.model_copy(update={"run": name, "mask": name}))
            if number == 1:
                node = federation.node("a", policy=limits)

            def is_answered(name: bytes = bytes.fromhex(name), number: int = number) -> bool:
                eye = federation.eye
                refuses = [status for status in eye.statuses.get("a", []) if status.refuses]
                return bool(refuses) if number == 3 else name in {want.blob for want in eye.wants.get("a", [])}

            await until(is_answered, within_s=60.0)
        said = await said_by(federation)
        assert said.startswith("policy.max_day_bytes: with ")
        assert len({want.blob for want in federation.eye.wants["a"] if want.blob}) == 2
        server = federation.server(rounds=ROUNDS)  # an honest one of today has to wait until tomorrow
        await server.says("a node refuses the run", node="a")
        assert node.said("the run is refused")
        assert not node.over

        def shown() -> bool:  # the log says it before the ledger has it
            status = meerkat("status", tmp_path / "server").out
            return "policy.max_day_bytes" in status and f"{m.REFUSES}: 1" in status

        await until(shown)


def test_a_task_of_the_policy_that_is_none_is_a_wrong_first_start(meerkat: Meerkat, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"seed": 1}\n')
    table = {"id": "a", "federation": "f", "data": "rows.jsonl", "state_dir": "state", "policy": {"tasks": ["sst3"]}}
    (tmp_path / "node.toml").write_text(tomli_w.dumps(table))
    config = tmp_path / "node.toml"
    meerkat("node", "--config", config).failed(3, f"{config}: policy.tasks: sst3: is no built-in task")
