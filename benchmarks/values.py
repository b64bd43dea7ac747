"""What the codecs of values mode cost: bits a value, and accuracy on the demo's task.

    python -m benchmarks.values                         sizes, then seeds 0 to 2
    python -m benchmarks.values --seeds 0 --rounds 4

Four values nodes of equal weight on the demo's model and rows, T = 10 local first-order steps a round, batch 16. Sizes
are bits a value of the blobs of round 0, on the demo's mask and on all parameters ("dense"): the largest of the nodes',
and that of their mean. For the accuracy, the displacements go through the codecs of node and server as in a run, in one
process; "feedback" adds what an encoding left out to the node's next displacement. Prints Markdown tables.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from meerkat_mq.config import Codec, NodeValuesConfig
from meerkat_mq.core.batches import batch_rows
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.first_order import first_order_steps
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row
from meerkat_mq.core.values import Residual, mean_displacement, quantised
from meerkat_mq.demo.local import node_name
from meerkat_mq.demo.plan import Choices, DemoPlan, make_plan
from meerkat_mq.demo.settings import DEMO
from meerkat_mq.engines.evaluate import evaluate
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.wire.values import encode_values

STEPS = 10
CODECS: tuple[Codec, ...] = ("float32", "bfloat16", "int8")
BOUNDS: dict[Codec, float] = {"float32": 28, "bfloat16": 12, "int8": 8.6}
SIZES = (("demo", "adamw", 1e-2), ("demo", "sgd", 1e-1), ("dense", "adamw", 1e-3), ("dense", "sgd", 1e-2))
LR = 1e-2


class Way(NamedTuple):
    """How displacements travel."""

    node: Codec
    feedback: bool
    server: Codec


WAYS = (
    Way("float32", False, "float32"),
    Way("bfloat16", False, "bfloat16"),
    Way("bfloat16", True, "bfloat16"),
    Way("int8", False, "bfloat16"),
    Way("int8", True, "bfloat16"),
    Way("int8", False, "int8"),
    Way("int8", True, "int8"),
)


@dataclass
class Node:
    """A values node.

    Attributes:
        steps: taken so far.
    """

    name: str
    rows: Sequence[Row]
    residual: Residual
    steps: int = 0

    def displacement(
        self, engine: TransformersEngine, theta: Float32Array, config: NodeValuesConfig, seed: int
    ) -> Float32Array:
        run_id, first = bytes([seed]) * 16, self.steps
        self.steps += STEPS
        numbers = [batch_rows(run_id, self.name, len(self.rows), DEMO.batch, step) for step in range(first, self.steps)]
        batches = [[self.rows[number] for number in batch] for batch in numbers]
        return first_order_steps(engine, theta, batches, config)[0]


def nodes_of(plan: DemoPlan, codec: Codec, size: int) -> list[Node]:
    return [Node(node_name(number), rows, Residual(codec, size)) for number, rows in enumerate(plan.shards)]


def mean_of(displacements: Sequence[Float32Array]) -> Float32Array:
    return mean_displacement([(1 / len(displacements), values) for values in displacements], displacements[0].size)


def bits(values: Float32Array, codec: Codec) -> float:
    return 8 * len(encode_values(values, codec)) / values.size


def sizes(masks: dict[str, Mask], plan: DemoPlan) -> Iterator[str]:
    yield (
        "| mask | n | optimiser | displacement | "
        + " | ".join(f"{codec} ≤ {BOUNDS[codec]:g}" for codec in CODECS)
        + " |"
    )
    yield "|---" * 7 + "|"
    for name, optimiser, lr in SIZES:
        mask = masks[name]
        engine = TransformersEngine(load_model(plan.source), mask, plan.task)
        config = NodeValuesConfig.model_validate({"optimiser": optimiser, "lr": lr})
        found = [node.displacement(engine, mask.theta_0, config, 0) for node in nodes_of(plan, "float32", mask.size)]
        for what, group in (("a node's", found), ("mean", [mean_of(found)])):
            cells = (f"{max(bits(values, codec) for values in group):.2f}" for codec in CODECS)
            yield f"| {name} | {mask.size:,} | {optimiser} | {what} | " + " | ".join(cells) + " |"


class Outcome(NamedTuple):
    """Of one run: on held-out rows, and of the last round's node displacements; error is ‖got − wanted‖ ÷ ‖wanted‖."""

    accuracy: float
    loss: float
    bytes_up: float
    bytes_down: float
    error: float


def train(engine: TransformersEngine, mask: Mask, plan: DemoPlan, way: Way, rounds: int) -> Outcome:
    nodes, theta = nodes_of(plan, way.node, mask.size), mask.theta_0
    config, errors, up, down = NodeValuesConfig(optimiser="adamw", lr=LR), list[float](), 0, 0
    for version in range(rounds):
        heard = []
        for node in nodes:
            made = node.displacement(engine, theta, config, plan.seed)
            wanted = node.residual.add(version, made) if way.feedback else made
            node.residual.forget(version, heard=True)
            heard.append(quantised(wanted, way.node))
            up += len(encode_values(wanted, way.node))
            errors.append(float(np.linalg.norm(heard[-1] - made) / np.linalg.norm(made)))
        mean = mean_of(heard)
        down += len(encode_values(mean, way.server))
        theta = theta + quantised(mean, way.server)
    engine.write(theta)
    found = evaluate(engine, plan.held_out)
    return Outcome(found.accuracy, found.loss, up / rounds / len(nodes), down / rounds, statistics.mean(errors))


def accuracies(mask: Mask, seeds: Sequence[int], rounds: int) -> Iterator[str]:
    yield "| node | feedback | server | accuracy by seed | mean | against float32 | loss | error | bytes up | down |"
    yield "|---" * 10 + "|"
    plans = [make_plan(Choices(seed=seed)) for seed in seeds]
    engine = TransformersEngine(load_model(plans[0].source), mask, plans[0].task)
    first = 0.0
    for way in WAYS:
        found = [train(engine, mask, plan, way, rounds) for plan in plans]
        mean = Outcome(*map(statistics.mean, zip(*found, strict=True)))
        first = first or mean.accuracy
        each = ", ".join(f"{100 * outcome.accuracy:.1f}" for outcome in found)
        yield (
            f"| {way.node} | {'yes' if way.feedback else 'no'} | {way.server} | {each} | {100 * mean.accuracy:.2f} | "
            f"{100 * (mean.accuracy - first):+.2f} | {mean.loss:.4f} | {mean.error:.2%} | {mean.bytes_up:.0f} | "
            f"{mean.bytes_down:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = make_plan(Choices())
    loaded, text, settings = load_model(plan.source), plan.calibration(), plan.settings
    masks = {
        "demo": make_mask(loaded, text, sequences=settings.calibration_sequences, length=settings.calibration_tokens),
        "dense": make_mask(loaded, text, "dense", sequences=4, length=settings.calibration_tokens),
    }
    for line in sizes(masks, plan):
        print(line, flush=True)
    print(flush=True)
    for line in accuracies(masks["demo"], args.seeds, args.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
