"""Runs that never were, for looking at."""

import math
import random
from dataclasses import replace
from typing import Any

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.observe.events import Evaluated, RoundClosed
from meerkat_mq.observe.report import NodeReport, Report, Standing
from meerkat_mq.rounds.records import Judgement
from meerkat_mq.tasks.classification import Classification
from meerkat_mq.wire.descriptor import RunDescriptor

DIGEST = "0f" * 16
CLASSES = ("routine", "degraded", "failure", "security")
LABELS = ((140, 96, 90, 74), (61, 180, 103, 56), (210, 34, 120, 36), (0, 0, 0, 400))

TASK = Classification(
    name="triage",
    fields=("line",),
    template="{line}\nTriage:",
    label_words=tuple(f" {name}" for name in CLASSES),
    text="{line}",
    descriptions=tuple(f"a {name} message" for name in CLASSES),
)


def a_descriptor(**changes: Any) -> RunDescriptor:
    settings: dict[str, Any] = {
        "federation": "demo",
        "run": "5e" * 16,
        "engine": "transformers",
        "model": "field-logs-1m",
        "task": TASK.describe(),
        "dtype": "float32",
        "fingerprint": "ab" * 32,
        "tokenizer": "cd" * 32,
        "mask": "12" * 16,
        "mask_bytes": 9_876,
        "mask_chunks": 1,
        "weights": 742,
        "stream": "mk1",
        "rounds": 300,
        "local_steps": 1,
        "directions": 4,
        "lr": 0.1,
        "eps": 0.01,
        "batch_size": 16,
        "digest_every": 10,
    }
    return RunDescriptor(**(settings | changes))


def a_round(number: int, *, loss: float = 1.0, seconds: float | None = None, **changes: Any) -> RoundClosed:
    version = number + 1
    seconds = 0.37 * version if seconds is None else seconds
    return replace(RoundClosed(number, seconds, loss, 4, 4, 208 * version), **changes)


def a_judgement(node: str, *, early_stopped: bool, version: int = 0, rho_later: float | None = None) -> Judgement:
    found = (4.25, 0.62) if early_stopped else (0.71, 0.14)
    return Judgement(version, node, found[0] if rho_later is None else rho_later, found[1], early_stopped)


def calibrated(stopped: str, *others: str) -> dict[str, Any]:
    """What a report has of a run with early stopping: the path of `stopped` decays and ends early."""
    noise = random.Random(11)

    def size(step: int, decay: float) -> float:
        return abs(noise.gauss(0, 0.004)) * math.exp(-step * decay)

    names = (stopped, *others)
    return {
        "descriptor": a_descriptor(local_steps=10),
        "magnitudes": {
            name: [
                (step, size(step, 0.05 if name == stopped else 0)) for step in range(1, 121 if name == stopped else 301)
            ]
            for name in names
        },
        "judgements": {name: a_judgement(name, early_stopped=name == stopped) for name in names},
        "early_stopping": EarlyStoppingConfig(by="vpcs"),
    }


def evaluated(version: int, accuracy: float) -> Evaluated:
    return replace(an_evaluation(version, accuracy), seconds=0.37 * version)


def an_evaluation(version: int, accuracy: float, *, majority: float | None = 0.31) -> Evaluated:
    figures = {"accuracy": accuracy, "loss": 2 * (1 - accuracy)} | ({} if majority is None else {"majority": majority})
    return Evaluated(version=version, rows=1000, figures=figures)


def a_node(**changes: Any) -> NodeReport:
    figures: dict[str, Any] = {
        "updates": 300,
        "rows": sum(LABELS[0]),
        "labels": LABELS[0],
        "payload_bytes": 15_600,
        "packet_bytes": 27_300,
        "sent_bytes": 31_200,
        "received_bytes": 88_000,
        "peak_rss_mib": 312.4,
        "digest": DIGEST,
    }
    return NodeReport(**(figures | changes))


def a_report(**changes: Any) -> Report:
    """300 rounds by four nodes: 58.1 % → 88.4 %, with a bound of 91.2 %."""
    noise = random.Random(7)
    losses = [0.35 + 0.75 * math.exp(-version / 90) + noise.gauss(0, 0.07) for version in range(300)]
    accuracies = [0.884 - 0.303 * math.exp(-version / 70) + noise.gauss(0, 0.008) for version in range(20, 300, 20)]
    figures: dict[str, Any] = {
        "descriptor": a_descriptor(),
        "model": "field-logs-1m",
        "parameters": 1_063_040,
        "classes": CLASSES,
        "standing": Standing.FINISHED,
        "closed": 300,
        "at": "2026-11-28T19:20:08.123456Z",
        "losses": list(enumerate(losses)),
        "evaluations": [
            an_evaluation(0, 0.581),
            *(an_evaluation(20 * index, accuracy) for index, accuracy in enumerate(accuracies, 1)),
            an_evaluation(300, 0.884),
        ],
        "nodes": {f"node-{index}": a_node(labels=labels) for index, labels in enumerate(LABELS)},
        "digest": DIGEST,
        "bound": 0.912,
        "seconds": 112.3,
        "counts": {"late": 2, "refused: resynchronise": 1},
        "covered": 740_000,
    }
    return Report(**(figures | changes))
