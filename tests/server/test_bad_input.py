"""What a user of a server may get wrong: one line that names file, key and remedy, and the documented exit code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from meerkat_mq.engines.toy import toy_mask
from tests.ledger.ledgers import alter, write
from tests.support.command import Meerkat
from tests.support.mosquitto import Mosquitto

pytestmark = pytest.mark.timeout(300)  # the first import of torch takes long on a busy machine

Files = Callable[..., Path]
TOY: dict[str, Any] = {"engine": "toy", "toy_weights": 40, "broker": {"max_packet_bytes": 4096}}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Write a federation's TOML."""

    def write(**settings: Any) -> Path:
        toy_mask(10).save(tmp_path / "mask.mkm")
        table = {"federation": "f", "state_dir": "state", "mask": "mask.mkm", "task": "sst2"} | settings
        config = tmp_path / "federation.toml"
        config.write_text(tomli_w.dumps({key: value for key, value in table.items() if value is not None}))
        return config

    return write


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (
            {"rounds": {"directions": 8, "min_nodes": 4}},
            2,
            ["rounds.directions: 8 lanes are more than the 4 nodes", "lower directions, or raise min_nodes"],
        ),
        (
            {"rounds": {"directions": 3, "min_nodes": 4, "min_updates": 1, "fraction": 0.5}},
            2,
            ["rounds.directions: 3 lanes are more than the 2 nodes", "or fraction"],
        ),
        ({"task": "sst3"}, 3, ["task: sst3: is no built-in task; use one of agnews, boolq"]),
        ({"task": "none.toml"}, 3, ["task: none.toml: cannot be read"]),
        ({"task": None}, 2, ["task: is missing; name a built-in task"]),
        ({"mask": None}, 2, ["mask: is missing; name a mask file; `meerkat mask` writes one"]),
        ({"mask": "none.mkm"}, 4, ["mask: ", "none.mkm: cannot be read", "make one with `meerkat mask`"]),
        ({"mask": "federation.toml"}, 4, ["mask: ", "federation.toml: mask file: is not a mask file"]),
        ({"state_dir": "mask.mkm"}, 2, ["state_dir ", "mask.mkm: cannot be used", "name a folder that can be written"]),
        ({"federation": "f/g"}, 2, ["federation: ", "'f/g'"]),
        ({"rounds": {"count": 0}}, 2, ["rounds.count: ", "not 0"]),
        (
            {"engine": "toy", "broker": {"max_packet_bytes": 1024}},
            2,
            ["broker.max_packet_bytes: is 1024, and ", " makes a packet of ", "set it to ", "the broker's limit too"],
        ),
        (
            TOY | {"rounds": {"local_steps": 600}},
            2,
            ["broker.max_packet_bytes: is 4096, and a round's entry makes a packet of 4", "set it to 4"],
        ),
        (
            TOY | {"rounds": {"local_steps": 100, "mode": "buffered", "max_staleness": 9}},
            2,
            ["broker.max_packet_bytes: is 4096, and a round's entry makes a packet of 10", "set it to 10"],
        ),
        (
            TOY | {"rounds": {"min_nodes": 20_000, "directions": 1}},
            2,
            ["broker.max_packet_bytes: is 4096, and a round of 20000 nodes makes a packet of 5"],
        ),
    ],
)
def test_a_wrong_setting(meerkat: Meerkat, files: Files, settings: dict[str, Any], code: int, words: list[str]) -> None:
    config = files(**settings)
    meerkat("server", "--config", config).failed(code, f"meerkat: {config}: ", *words)


@pytest.mark.parametrize(
    "statement", ["UPDATE run SET descriptor = '{}'", "UPDATE run SET rules = 'zz'", "UPDATE run SET rules = '{}'"]
)
def test_a_damaged_ledger_stops_a_server(meerkat: Meerkat, files: Files, tmp_path: Path, statement: str) -> None:
    write(tmp_path / "state")
    alter(tmp_path / "state", statement)
    meerkat("server", "--config", files(engine="toy")).failed(6, "ledger.sqlite: holds ", "restore it from a backup")


def test_wrong_credentials_stop_a_server(
    meerkat: Meerkat, files: Files, make_mosquitto: Callable[..., Mosquitto]
) -> None:
    broker = make_mosquitto(anonymous=False)
    outcome = meerkat("server", "--config", files(engine="toy", broker={"url": broker.url}))
    outcome.failed(5, f"127.0.0.1:{broker.port}: refuses client", "check broker.username")


def test_an_evaluation_needs_a_model_and_data(meerkat: Meerkat, files: Files, tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "held-out.jsonl").write_text('{"sentence": "x", "label": 3}\n')
    evaluation = {"data": "held-out.jsonl"}
    config = files(evaluation=evaluation)
    meerkat("server", "--config", config).failed(2, f"{config}: evaluation: needs a [model] section")
    config = files(evaluation=evaluation, model={"source": str(tiny_llama)})
    meerkat("server", "--config", config).failed(3, f"{config}: evaluation.data: ", "held-out.jsonl:1: 'label' is 3")
    (tmp_path / "held-out.jsonl").write_text('{"sentence": "x", "label": 1}\n')
    meerkat("server", "--config", files(evaluation=evaluation, model={"source": str(tiny_llama)})).failed(
        4, f"{config}: model.source: {tiny_llama}: the mask's toy has shape (10,)"
    )
