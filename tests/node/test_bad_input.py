"""What a user of a node may get wrong: one line that names file, key and remedy, and the documented exit code."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from meerkat_mq.config import BrokerConfig, ServerConfig
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.ledger.run import Run
from meerkat_mq.server.run import prepare_run
from meerkat_mq.wire.frames import encode
from tests.server.federation import TOPICS, Federation
from tests.support.command import Meerkat
from tests.support.mosquitto import Mosquitto
from tests.support.peer import peer

pytestmark = pytest.mark.timeout(300)  # the first import of torch takes long on a busy machine

chunks_alone = pytest.mark.not_on(
    rabbitmq="keeps no retained chunks for a wildcard filter, and there is no server to ask"
)

GOOD = json.dumps({"sentence": "good", "label": 1})


def make_run(folder: Path, **settings: Any) -> Run:
    """A run of SST-2 rows; its mask is of no model."""
    toy_mask(10).save(folder / "mask.mkm")
    defaults = {"federation": "f", "state_dir": folder, "mask": folder / "mask.mkm", "task": "sst2"}
    return prepare_run(ServerConfig.model_validate(defaults | settings))


async def announce(broker: BrokerConfig, run: Run) -> None:
    """Put on the broker what a node of this run needs."""
    async with peer(broker, "announcer") as announcer:
        announcer.session.publish(TOPICS.run, run.descriptor.encode(), retain=True)
        for chunk in run.chunks:
            announcer.session.publish(TOPICS.blob(chunk.blob, chunk.index), encode(chunk), retain=True)
        await announcer.session.drain(10)


@chunks_alone
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (b"", ["rows.jsonl: holds no rows; give a JSONL file"]),
        (b"\n  \n", ["rows.jsonl: holds no rows"]),
        (f"{GOOD}\n\n{GOOD[:-3]}\n".encode(), ["rows.jsonl:3: is not JSON", "mend or remove the line"]),
        (f"{GOOD}\n[1]\n".encode(), ["rows.jsonl:2: is list, not a JSON object"]),
        (b'{"sentence": "x", "label": 2}', ["rows.jsonl:1: 'label' is 2; task sst2 has labels 0 to 1"]),
        (b'{"sentence": "x", "label": "1"}', ["rows.jsonl:1: 'label' is '1'"]),
        (b'{"sentence": "x"}', ["rows.jsonl:1: 'label' is missing"]),
        (b'{"text": "x", "label": 1}', ["rows.jsonl:1: field 'sentence' is missing; the line has text, label"]),
        (b'{"sentence": "\xff", "label": 1}', ["rows.jsonl: is not UTF-8"]),
    ],
)
async def test_data_that_does_not_fit_the_task(federation: Federation, rows: bytes, words: list[str]) -> None:
    await announce(federation.broker, make_run(federation.folder))
    (federation.folder / "rows.jsonl").write_bytes(rows)
    node = federation.node("node-0", data="rows.jsonl", model="none")
    await node.failed(3, f"meerkat: {node.config}: data: ", *words)
    await federation.eye.status("node-0", "stopped")


@chunks_alone
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", "rows.jsonl: holds no rows"),
        ('{"seed": 1}\n{"seed": 1', "rows.jsonl:2: is not JSON"),
        ('{"seed": "x"}', "rows.jsonl:1: has no integer seed"),
        ("[]", "rows.jsonl: holds no rows"),
        ("[7]", "rows.jsonl: item 1: is int, not a JSON object"),
    ],
)
async def test_toy_data(federation: Federation, rows: str, words: str) -> None:
    await announce(federation.broker, make_run(federation.folder, engine="toy"))
    (federation.folder / "rows.jsonl").write_text(rows)
    await federation.node("node-0", data="rows.jsonl").failed(3, "node-0.toml: data: ", words, '{"seed": 7}')


@chunks_alone
async def test_a_node_imports_no_module_because_a_server_names_it(federation: Federation) -> None:
    await announce(federation.broker, make_run(federation.folder, engine="os:system"))
    said = "engine: the run computes with 'os:system', and this file names "
    await federation.node("node-0").failed(6, said + "none", "if you trust that code")
    await federation.node("node-0", engine="others:Engine").failed(6, said + "'others:Engine'")


@chunks_alone
async def test_a_run_that_needs_a_model(federation: Federation) -> None:
    await announce(federation.broker, make_run(federation.folder))
    await federation.node("node-0").failed(2, "node-0.toml: model: is missing; name the folder or hub id")


Files = Callable[..., Path]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Write a node's TOML, and its rows."""

    def write(**settings: Any) -> Path:
        (tmp_path / "rows.jsonl").write_text(f"{GOOD}\n")
        table = {"id": "a", "federation": "f", "data": "rows.jsonl", "state_dir": "state"} | settings
        config = tmp_path / "node.toml"
        config.write_text(tomli_w.dumps(table))
        return config

    return write


def test_what_is_wrong_before_any_connection(meerkat: Meerkat, files: Files, tmp_path: Path) -> None:
    config = files(id="köln/1")
    meerkat("node", "--config", config).failed(2, f"{config}: id: ", "'köln/1'", "letters, digits, '_' and '-'")
    config = files(data="none.jsonl")
    meerkat("node", "--config", config).failed(
        3, f"{config}: data: {tmp_path}/none.jsonl: there is no such file; name the node's rows: a JSON"
    )
    config = files(state_dir="rows.jsonl")
    meerkat("node", "--config", config).failed(2, f"{config}: state_dir {tmp_path}/rows.jsonl: cannot be used")
    config = files(limits={"allow": ["on-mains", "--quiet"]})
    meerkat("node", "--config", config).failed(2, f"{config}: limits.allow: there is no command 'on-mains'")
    meerkat("node", "--config", tmp_path / "none.toml").failed(2, "none.toml: cannot be read")
    config = files(broker={"url": "mqtts://127.0.0.1:1", "ca_file": "none.pem"})
    meerkat("node", "--config", config).failed(2, f"{config}: broker.ca_file: {tmp_path}/none.pem: No such file")


def test_wrong_credentials_stop_a_node(
    meerkat: Meerkat, files: Files, make_mosquitto: Callable[..., Mosquitto]
) -> None:
    broker = make_mosquitto(anonymous=False)
    config = files(broker={"url": broker.url, "username": "node", "password": "wrong"})
    outcome = meerkat("node", "--config", config)
    outcome.failed(5, f"127.0.0.1:{broker.port}: refuses user 'node'", "check broker.username and broker.password")
    assert "wrong" not in outcome.err


@chunks_alone
def test_a_model_that_is_not_the_masks(
    meerkat: Meerkat, files: Files, mosquitto: Mosquitto, tmp_path: Path, tiny_llama: Path
) -> None:
    import torch

    from meerkat_mq.engines.torch.load import load_model
    from meerkat_mq.engines.torch.masks import make_mask
    from tests.engines import tiny

    mask = tmp_path / "m.mkm"
    make_mask(load_model(tiny_llama), tiny.TEXTS, "magnitude", density=0.1, sequences=4, length=32).save(mask)
    asyncio.run(announce(mosquitto.config, make_run(tmp_path, mask=mask)))

    def fails(model: object, code: int, *words: str) -> None:
        config = files(model=str(model), broker={"url": mosquitto.url})
        meerkat("node", "--config", config).failed(code, f"{config}: model: ", *words)

    fails(tmp_path / "none", 4, "none: no such folder; give the folder of a Hugging Face model")
    fails(tmp_path, 4, f"{tmp_path}: has no config.json")

    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight += 1
    other = tiny.save(model, tmp_path / "other")
    fails(other, 4, "other: another checkpoint: fingerprint", "give the base model that the run's mask was made on")

    smaller = tiny.save(tiny.llama(num_hidden_layers=1), tmp_path / "smaller")
    fails(smaller, 4, "smaller: the mask's model.layers.1.", "the model has no matrix of this name")

    words = tiny.save(tiny.llama(), tmp_path / "words")
    tiny.tokenizer(vocabulary=300).save_pretrained(words)
    fails(words, 4, "words: another tokenizer: fingerprint", "give the base model")
