"""A whole federation on this machine: broker, server here, and node processes."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from meerkat_mq.broker.embedded import embedded_broker
from meerkat_mq.config import BrokerConfig, EvaluationConfig, ModelConfig, ServerConfig
from meerkat_mq.core.step import Row
from meerkat_mq.demo.plan import DemoPlan
from meerkat_mq.errors import RunError
from meerkat_mq.observe.events import Observer, RunEvent, RunFinished, RunStarted
from meerkat_mq.server.service import serve
from meerkat_mq.tasks.data import write_rows

NODE_EXIT_S = 30.0
FEDERATION = "demo"
SERVER = "server"  # its state_dir, in the demo's folder


@dataclass(frozen=True)
class LocalResult:
    """What came of it.

    Attributes:
        run: its id, hex.
        node_reports: each node's own last words: peak_rss_mib, digest, sent and received bytes by kind.
    """

    run: str
    finished: RunFinished
    node_reports: dict[str, dict[str, Any]]


async def run_local(plan: DemoPlan, folder: Path, mask: Path, observer: Observer) -> LocalResult:
    """Run the federation to its end.

    Args:
        plan: what to run.
        folder: where everything is written; must exist, and hold no run.
        mask: mask file.
        observer: is told what happens.

    Raises:
        MeerkatError: the broker, the server or a node failed; names the log.
    """
    events: list[RunEvent] = []

    def observe(event: RunEvent) -> None:
        events.append(event)
        observer(event)

    names = [node_name(number) for number in range(len(plan.shards))]
    async with embedded_broker() as broker, asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(broker.watch())
        nodes = [
            tasks.create_task(_run_node(plan, folder, name, rows, broker.config))
            for name, rows in zip(names, plan.shards, strict=True)
        ]
        await serve(_server_config(plan, folder, mask, broker.config), observer=observe)
        await asyncio.wait(nodes, timeout=NODE_EXIT_S)
        for task in (watching, *nodes):
            task.cancel()
    return LocalResult(
        run=next(event.descriptor.run for event in events if isinstance(event, RunStarted)),
        finished=next(event for event in events if isinstance(event, RunFinished)),
        node_reports={name: _last_words(folder / f"{name}.log") for name in names},
    )


def node_name(number: int) -> str:
    """The id of a local node."""
    return f"node-{number}"


def _server_config(plan: DemoPlan, folder: Path, mask: Path, broker: BrokerConfig) -> ServerConfig:
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


async def _run_node(plan: DemoPlan, folder: Path, name: str, rows: Sequence[Row], broker: BrokerConfig) -> None:
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
