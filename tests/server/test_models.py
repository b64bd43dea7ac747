"""Federations of real processes that compute with a tiny model: what nodes must have alike, keep and say."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.config import ServerConfig
from meerkat_mq.core import metrics as m
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.signal import LEAST
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.errors import ConfigError, TaskError
from meerkat_mq.ledger.folder import verify_folder
from meerkat_mq.server.run import prepare_run
from meerkat_mq.wire.descriptor import RunDescriptor, decode_control
from tests.engines import tiny
from tests.engines.test_continuations import TEMPLATE
from tests.server.federation import Federation, Service, all_end
from tests.support.command import Meerkat
from tests.support.mosquitto import Mosquitto

pytestmark = pytest.mark.timeout(300)  # the first import of torch takes long on a busy machine

LINES = 'template = "{line} The thing is"\nlabel_words = [" broken", " running"]\nmax_tokens = 48\n'
CHAT = 'kind = "completion"\ntemplate = "{line}"\ncompletion = "{line}"\nchat = true\nmax_tokens = 64\n'


def prepare(folder: Path, model: Path, task: str, **settings: Any) -> Mask:
    """The files of a run: mask, task and rows."""
    chosen: dict[str, Any] = {"density": 0.1, **tiny.SMALL, **settings}
    mask = make_mask(load_model(model), tiny.TEXTS, "magnitude", **chosen)
    mask.save(folder / "m.mkm")
    (folder / "task.toml").write_text(task)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.ROWS[:24]))
    return mask


def server_of(federation: Federation, rounds: dict[str, Any], **settings: Any) -> Service:
    files: dict[str, Any] = {
        key: str(federation.folder / name) for key, name in (("mask", "m.mkm"), ("task", "task.toml"))
    }
    return federation.server("--once", rounds=rounds, engine="transformers", **files, **settings)


def node_of(federation: Federation, name: str, model: Path, **settings: Any) -> Service:
    given: dict[str, Any] = {"model": str(model), "data": str(federation.folder / "rows.jsonl"), "threads": 1}
    return federation.node(name, **{**given, "exit_when_finished": True, "policy": {"min_batch": 1}, **settings})


async def test_a_node_with_another_chat_template_is_refused(
    mosquitto: Mosquitto, tmp_path: Path, tiny_llama: Path
) -> None:
    base, other = (Path(shutil.copytree(tiny_llama, tmp_path / name)) for name in ("base", "other"))
    (base / "chat_template.jinja").write_text(TEMPLATE)
    (other / "chat_template.jinja").write_text(TEMPLATE.replace("<assistant>", "<bot>"))
    prepare(tmp_path, base, CHAT)
    async with Federation(tmp_path, mosquitto.config, models=True) as federation:
        server = server_of(federation, {"count": 3, "min_nodes": 2}, model={"source": str(base)})
        await node_of(federation, "odd", other).failed(4, f"{other}: another chat template: fingerprint ", within_s=40)
        nodes = [node_of(federation, name, base) for name in "ab"]
        assert await all_end(server, *nodes) == [0, 0, 0], [node.plain for node in nodes]
        assert len({node.said("finished")[0]["digest"] for node in nodes}) == 1
        assert {len(run.completion or "") for run in federation.eye.runs} == {64}
        with federation.ledger() as ledger:
            assert {row.node for row in ledger.nodes() if row.updates} == {"a", "b"}
    assert verify_folder(tmp_path / "server").rounds == 3


def test_a_run_of_completions_needs_the_server_s_tokenizer(tmp_path: Path, tiny_llama: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    (base / "chat_template.jinja").write_text(TEMPLATE)
    prepare(tmp_path, base, CHAT)
    table = {"federation": "f", "state_dir": tmp_path, "mask": tmp_path / "m.mkm", "task": str(tmp_path / "task.toml")}
    with pytest.raises(ConfigError, match=r"^model: is missing, and nodes compare the chat template and end token"):
        prepare_run(ServerConfig.model_validate(table))
    config = ServerConfig.model_validate(table | {"model": {"source": str(base)}})
    begun = prepare_run(config).descriptor
    assert begun.completion is not None
    assert decode_control(begun.encode(), RunDescriptor) == begun
    (base / "chat_template.jinja").write_text(TEMPLATE.replace("<assistant>", "<bot>"))
    assert prepare_run(config, begun).descriptor.completion == begun.completion  # it is fixed for a run
    assert prepare_run(config).descriptor.completion != begun.completion
    older = begun.model_copy(update={"completion": None})
    assert prepare_run(config, older).descriptor.completion is None  # nodes go on as they did
    (base / "chat_template.jinja").unlink()
    with pytest.raises(TaskError, match=r"^model.source: task task: chat: the model's tokenizer has no chat template"):
        prepare_run(config)
    (tmp_path / "task.toml").write_text(LINES)
    assert prepare_run(ServerConfig.model_validate(table)).descriptor.completion is None


async def test_a_node_whose_scalars_are_noise_says_so_to_all(
    mosquitto: Mosquitto, tmp_path: Path, tiny_llama: Path, meerkat: Meerkat
) -> None:
    """At this eps, float32 rounds the difference of two losses away."""
    prepare(tmp_path, tiny_llama, LINES)
    async with Federation(tmp_path, mosquitto.config, models=True) as federation:
        server = server_of(federation, {"count": 2, "eps": 1e-7})
        node = node_of(federation, "a", tiny_llama, policy={"min_batch": 1, "min_eps": 1e-9})
        warned = await node.says("projected gradients are noise")
        assert "raise rounds.eps for all nodes" in warned["remedy"]
        said = await server.says(m.NOISY, node="a")
        assert await all_end(server, node) == [0, 0]
        ratios = {status.signal for status in federation.eye.statuses["a"]} - {None}
        assert ratios
        assert all(ratio is not None and ratio < LEAST for ratio in ratios)
        assert said["signal_to_noise"] in ratios
        (status,) = json.loads(meerkat("status", tmp_path / "server", "--json").out.splitlines()[-1])["nodes"]
        assert "signal to noise" in status["flagged"], status


async def test_frozen_prefixes_end_with_the_same_weights(
    mosquitto: Mosquitto, tmp_path: Path, tiny_llama: Path
) -> None:
    """One node keeps states and is killed in between, one keeps none; theta is exact, so all hold the same."""
    mask = prepare(tmp_path, tiny_llama, LINES, from_layer=1)
    assert {matrix.name.split(".")[2] for matrix in mask.matrices} == {"1"}
    kept = {"prefix": {"memory_mib": 1, "disk_mib": 4}}
    async with Federation(tmp_path, mosquitto.config, models=True) as federation:
        server = server_of(federation, {"count": 60, "min_nodes": 2, "lr": 1e-3, "directions": 2})
        bare = node_of(federation, "bare", tiny_llama, prefix={"memory_mib": 0})
        first = node_of(federation, "keeps", tiny_llama, **kept)
        line = await first.says("frozen prefix: computed once a row")
        assert (line["blocks"], line["of"]) == (1, 2)
        await federation.eye.reaches(2)
        first.kill()
        files = list((tmp_path / "keeps" / "prefix").glob("*/*"))
        assert files
        again = node_of(federation, "keeps", tiny_llama, **kept)
        assert await all_end(server, bare, again) == [0, 0, 0], [bare.plain, again.plain, server.plain]
        assert [path for path in files if path.exists()] == files  # what was kept is what the new process keeps
        digests = {node.said("finished")[0]["digest"] for node in (bare, again)}
        assert digests == {server.said("run finished")[0]["digest"]}
    assert not (tmp_path / "bare" / "prefix").exists()
    assert verify_folder(tmp_path / "server").rounds == 60
