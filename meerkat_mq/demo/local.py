"""A whole federation on this machine: broker, server here, and node processes."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w

from meerkat_mq.broker.embedded import embedded_broker
from meerkat_mq.config import (
    BrokerConfig,
    EarlyStoppingConfig,
    EvaluationConfig,
    ModelConfig,
    RoundsConfig,
    ServerConfig,
)
from meerkat_mq.core.step import Row
from meerkat_mq.errors import RunError
from meerkat_mq.observe.events import Evaluated, Observer, RunEvent, RunFinished, RunStarted
from meerkat_mq.server.service import serve
from meerkat_mq.tasks.data import write_rows
from meerkat_mq.tasks.task import Task

NODE_EXIT_S = 30.0
FEDERATION = "demo"
SERVER = "server"  # its state_dir, in the demo's folder


@dataclass(frozen=True, kw_only=True)
class LocalFederation:
    """What to run.

    Attributes:
        source: base model, folder or hub id.
        task: what its rows mean.
        shards: the rows of each node.
        held_out: rows that the server evaluates on.
        every: rounds between evaluations.
        dtype: of the model, on nodes and on the server.
    """

    source: str
    task: Task
    shards: Sequence[Sequence[Row]]
    held_out: Sequence[Row]
    rounds: RoundsConfig
    every: int
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass
class LocalResult:
    """What came of it.

    Attributes:
        run: its id, hex.
        node_reports: each node's own last words: peak_rss_mib, digest, sent and received bytes by kind.
        program: the broker that was used.
    """

    run: str = ""
    evaluations: list[Evaluated] = field(default_factory=list)
    finished: RunFinished | None = None
    node_reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    program: str = ""


async def run_local(
    plan: LocalFederation, folder: Path, mask: Path, observer: Observer = lambda event: None
) -> LocalResult:
    """Run the federation to its end.

    Args:
        plan: what to run.
        folder: where everything is written; must exist, and hold no run.
        mask: mask file.
        observer: is told what happens.

    Raises:
        MeerkatError: the broker, the server or a node failed; names the log.
    """
    result = LocalResult()

    def observe(event: RunEvent) -> None:
        match event:
            case RunStarted():
                result.run = event.descriptor.run
            case Evaluated():
                result.evaluations.append(event)
            case RunFinished():
                result.finished = event
        observer(event)

    async with embedded_broker() as broker:
        result.program = broker.program
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(broker.watch())
            nodes = [
                tasks.create_task(_run_node(plan, folder, node_name(number), rows, broker.config))
                for number, rows in enumerate(plan.shards)
            ]
            await serve(_server_config(plan, folder, mask, broker.config), observer=observe)
            await asyncio.wait(nodes, timeout=NODE_EXIT_S)
            for task in (watching, *nodes):
                task.cancel()
    names = map(node_name, range(len(plan.shards)))
    result.node_reports = {name: _last_words(folder / f"{name}.log") for name in names}
    return result


def node_name(number: int) -> str:
    """The id of a local node."""
    return f"node-{number}"


def _server_config(plan: LocalFederation, folder: Path, mask: Path, broker: BrokerConfig) -> ServerConfig:
    held_out, task = folder / "held-out.jsonl", folder / "task.toml"
    write_rows(held_out, plan.held_out)
    task.write_text(tomli_w.dumps(plan.task.describe().model_dump(mode="json")), encoding="utf-8")
    return ServerConfig(
        federation=FEDERATION,
        state_dir=folder / SERVER,
        broker=broker,
        rounds=plan.rounds,
        early_stopping=plan.early_stopping,
        mask=mask,
        task=str(task),
        dtype=plan.dtype,
        model=ModelConfig(source=plan.source, dtype=plan.dtype),
        evaluation=EvaluationConfig(data=held_out, every=plan.every),
        once=True,
        wait_for_nodes_s=600,
    )


async def _run_node(plan: LocalFederation, folder: Path, name: str, rows: Sequence[Row], broker: BrokerConfig) -> None:
    write_rows(folder / f"{name}.jsonl", rows)
    settings = {
        "id": name,
        "federation": FEDERATION,
        "data": f"{name}.jsonl",
        "model": plan.source,
        "state_dir": name,
        "threads": 1,
        "exit_when_finished": True,
        "broker": {"url": broker.url},
    }
    config, log = folder / f"{name}.toml", folder / f"{name}.log"
    config.write_text(tomli_w.dumps(settings), encoding="utf-8")
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "meerkat_mq.node", "--config", str(config), "--json-logs"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    try:
        code = await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
    if code != 0:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or ["said nothing"])[-1]
        raise RunError(name, f"ended with exit code {code}: {last}", f"see {log}")


def _last_words(log: Path) -> dict[str, Any]:
    """Its line "finished", and its traffic by direction and kind; what is not there is left out."""
    found: dict[str, Any] = {"sent": {}, "received": {}}
    for line in log.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError):
            words = json.loads(line)
            if isinstance(words, dict) and words.get("event") == "finished":
                found |= words
            elif isinstance(words, dict) and words.get("event") == "traffic":
                found[words["direction"]][words["kind"]] = words
    return found
