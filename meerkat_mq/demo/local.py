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

from meerkat_mq.broker import embedded_broker
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
from meerkat_mq.observe.facts import Facts
from meerkat_mq.server import serve
from meerkat_mq.tasks.data import write_rows
from meerkat_mq.tasks.task import Task

NODE_EXIT_S = 30.0
SERVER = "server"  # its state_dir, in the demo's folder


@dataclass(frozen=True)
class LocalFederation:
    """What to run.

    Attributes:
        folder: where everything is written; must exist, and hold no run.
        source: base model, folder or hub id.
        task: what its rows mean.
        mask: mask file.
        shards: the rows of each node.
        held_out: rows that the server evaluates on.
        every: rounds between evaluations.
        threads: CPU threads of each node.
        facts: what is known of the run beforehand, for its report.
    """

    folder: Path
    source: str
    task: Task
    mask: Path
    shards: Sequence[Sequence[Row]]
    held_out: Sequence[Row]
    rounds: RoundsConfig
    every: int
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    threads: int = 1
    name: str = "demo"
    facts: Facts | None = None


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

    def take(self, event: RunEvent) -> None:
        """Keep an event of the server."""
        match event:
            case RunStarted():
                self.run = event.descriptor.run
            case Evaluated():
                self.evaluations.append(event)
            case RunFinished():
                self.finished = event


def _leave_facts(folder: Path, facts: Facts | None) -> None:
    """Leave what is known of the run beside its ledger, for its page."""
    if facts is not None:
        folder.mkdir(parents=True, exist_ok=True)
        facts.save(folder)


async def run_local(plan: LocalFederation, observer: Observer = lambda event: None) -> LocalResult:
    """Run the federation to its end.

    Raises:
        MeerkatError: the broker, the server or a node failed; names the log.
    """
    result = LocalResult()

    def observe(event: RunEvent) -> None:
        result.take(event)
        observer(event)

    await asyncio.to_thread(_leave_facts, plan.folder / SERVER, plan.facts)
    async with embedded_broker() as broker:
        result.program = broker.program
        async with asyncio.TaskGroup() as tasks:
            helpers = [tasks.create_task(broker.watch())]
            nodes = [
                tasks.create_task(_run_node(plan, number, rows, broker.config))
                for number, rows in enumerate(plan.shards)
            ]
            await serve(_server_config(plan, broker.config), observer=observe)
            await asyncio.wait(nodes, timeout=NODE_EXIT_S)
            for task in (*helpers, *nodes):
                task.cancel()
    for number in range(len(plan.shards)):
        result.node_reports[node_name(number)] = _last_words(plan.folder / f"{node_name(number)}.log")
    return result


def node_name(number: int) -> str:
    """The id of a local node."""
    return f"node-{number}"


def _server_config(plan: LocalFederation, broker: BrokerConfig) -> ServerConfig:
    held_out, task = plan.folder / "held-out.jsonl", plan.folder / "task.toml"
    write_rows(held_out, plan.held_out)
    task.write_text(tomli_w.dumps(plan.task.describe().model_dump(mode="json")), encoding="utf-8")
    return ServerConfig(
        federation=plan.name,
        state_dir=plan.folder / SERVER,
        broker=broker,
        rounds=plan.rounds,
        early_stopping=plan.early_stopping,
        mask=plan.mask,
        task=str(task),
        dtype=plan.dtype,
        model=ModelConfig(source=plan.source, dtype=plan.dtype, device=plan.device),
        evaluation=EvaluationConfig(data=held_out, every=plan.every),
        once=True,
        wait_for_nodes_s=600,
    )


async def _run_node(plan: LocalFederation, number: int, rows: Sequence[Row], broker: BrokerConfig) -> None:
    name = node_name(number)
    write_rows(plan.folder / f"{name}.jsonl", rows)
    settings = {
        "id": name,
        "federation": plan.name,
        "data": f"{name}.jsonl",
        "model": plan.source,
        "state_dir": name,
        "device": plan.device,
        "threads": plan.threads,
        "exit_when_finished": True,
        "broker": {"url": broker.url},
    }
    config, log = plan.folder / f"{name}.toml", plan.folder / f"{name}.log"
    config.write_text(tomli_w.dumps(settings), encoding="utf-8")
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "meerkat_mq.node", "--config", str(config), "--json-logs"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": str(plan.threads), "TOKENIZERS_PARALLELISM": "false"},
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
