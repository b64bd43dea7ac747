"""What a worker does: score a mask, evaluate the untrained model, train and evaluate one cell."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from meerkat_mq.core.files import write_atomically
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.core.path import digest
from meerkat_mq.demo.settings import WEIGHTS
from meerkat_mq.engines.evaluate import evaluate
from meerkat_mq.engines.prefix import Keep
from meerkat_mq.engines.torch.checkpoint import fingerprint
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.folder import find_folder
from meerkat_mq.engines.torch.load import LoadedModel, linear_layers, load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.observe.measure import BESIDE, PERPLEXITY
from meerkat_mq.observe.process import peak_rss_mib
from meerkat_mq.sweep.energy import EnergyMeter
from meerkat_mq.sweep.grid import Cell
from meerkat_mq.sweep.plan import OWN_MODEL, SweepPlan
from meerkat_mq.sweep.rows import calibration, rows_of, shards_of
from meerkat_mq.sweep.training import Report, diverged, train_federated, train_first_order
from meerkat_mq.tasks.data import class_counts
from meerkat_mq.tasks.task import Evaluation

SECONDS_DIGITS = 3


def save_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Keep an evaluation in a file."""
    write_atomically(
        path, json.dumps({"rows": evaluation.rows, **evaluation.figures, "recalls": evaluation.recalls}).encode()
    )


def load_evaluation(path: Path) -> Evaluation:
    """Read what `save_evaluation` wrote."""
    table = json.loads(path.read_text(encoding="utf-8"))
    rows, recalls = table.pop("rows"), table.pop("recalls")
    return Evaluation(rows, table, tuple(recalls))


def source_of(plan: SweepPlan) -> str:
    """The model's folder or hub id."""
    return str(WEIGHTS) if plan.model == OWN_MODEL else plan.model


def identify(plan: SweepPlan, _: Report) -> str:
    """Fetch a plan's model, where it is not here yet; returns its fingerprint in hex."""
    return fingerprint(find_folder(source_of(plan))).hex()


def make_cell_mask(cell: Cell, path: Path, report: Report) -> None:
    """Score a cell's mask and keep it."""
    plan, method = cell.plan, cell.method
    assert method.mask != "none"
    texts, sequences, length = calibration(cell)
    mask = make_mask(
        load_model(source_of(plan), device=plan.device),
        texts,
        method.mask,
        density=method.density,
        rank=method.rank,
        from_layer=cell.from_layer,
        seed=cell.mask_seed,
        sequences=sequences,
        length=length,
        progress=lambda done, total: report(done / total),
    )
    mask.save(path)


def make_baseline(cell: Cell, path: Path, report: Report) -> None:
    """Evaluate the untrained model on a cell's rows and keep the outcome."""
    plan = cell.plan
    loaded = load_model(source_of(plan), dtype=plan.dtype, device=plan.device)
    engine = TransformersEngine(loaded, _one_weight(loaded), cell.described)
    save_evaluation(path, evaluate(engine, engine.usable(rows_of(cell).evaluation), figures=cell.described.evaluation))
    report(1.0)


def run_cell(cell: Cell, mask: Path | None, baseline: Path, report: Report) -> dict[str, Any]:
    """Train and evaluate one cell; returns its figures, as in `results.jsonl`."""
    plan, task = cell.plan, cell.described
    before, rows = load_evaluation(baseline), rows_of(cell)
    shards = shards_of(rows.train, plan.nodes, cell.split, seed=cell.seed, class_of=task.class_of)
    counts = [class_counts(shard, task) for shard in shards]
    if mask is None:
        return _figures(before, before, counts) | {"forward_passes": 0}
    loaded, found = load_model(source_of(plan), dtype=plan.dtype, device=plan.device), Mask.load(mask)
    meter = EnergyMeter()
    engine = TransformersEngine(loaded, found, cell.described, Keep(plan.prefix_mib << 20))
    shards, evaluation = [engine.usable(shard) for shard in shards], engine.usable(rows.evaluation)

    def progress(share: float) -> None:
        report(share)
        meter.sample()

    if cell.method.federated:
        settings = cell.settings(found.hash, measured=bool(found.g_p.any()))
        every = plan.evaluate_every
        trained = train_federated(
            engine,
            found,
            shards,
            settings,
            evaluation=evaluation,
            figures=task.evaluation,
            every=every,
            report=progress,
        )
    else:
        trained = train_first_order(cell, engine, found, shards, progress)
    energy = meter.used(trained.cpu_seconds, plan.watts, plan.device)
    memory = peak_rss_mib()
    engine.write(trained.theta)
    with np.errstate(all="ignore"):  # what diverged may hold anything
        after = evaluate(engine, evaluation, figures=task.evaluation)
    return (
        _figures(before, after, counts)
        | {"diverged": diverged(trained, after, before, len(task.classes)), "ended": trained.ended}
        | {
            "weights": found.size,
            "rounds": trained.rounds,
            "forward_passes": trained.passes,
            "cpu_seconds": round(trained.cpu_seconds, SECONDS_DIGITS),
            "wall_seconds": round(trained.wall_seconds, SECONDS_DIGITS),
            "bytes_up": round(trained.bytes_up, 1),
            "bytes_down": round(trained.bytes_down, 1),
            "peak_memory_mib": memory,
            "energy_joules": round(energy.joules, 2),
            "energy_source": energy.source,
            "refused": trained.refused,
            "judgements": [asdict(judgement) for judgement in trained.judgements],
            "gradips": [asdict(gradip) for gradip in trained.gradips],
            "digest": digest(trained.theta).hex(),
            "curve": trained.curve,
        }
    )


def _figures(before: Evaluation, after: Evaluation, counts: Sequence[Sequence[int]]) -> dict[str, Any]:
    own = [own_mix(after.recalls, labels) for labels in counts if labels]
    others = {f"{key}_before": before.figures[key] for key in (PERPLEXITY.key, *BESIDE) if key in before.figures}
    return {
        **after.figures,
        **others,
        "accuracy": after.accuracy,
        "loss": after.loss,
        "accuracy_before": before.accuracy,
        "loss_before": before.loss,
        "majority": before.figures.get("majority"),
        "own_mix_mean": sum(own) / len(own) if own else None,
        "own_mix_min": min(own, default=None),
        "recalls": after.recalls,
        "labels": counts,
    }


def own_mix(recalls: Sequence[float | None], labels: Sequence[int]) -> float:
    """Accuracy on a node's own label mix: Σ_c share_c · recall_c, over the classes that were evaluated.

    `labels` are its rows by class.
    """
    known = [(count, recall) for count, recall in zip(labels, recalls, strict=True) if recall is not None]
    total = sum(count for count, _ in known)
    return sum(count * recall for count, recall in known) / total if total else 0.0


def _one_weight(loaded: LoadedModel) -> Mask:
    """The smallest mask: an engine needs one, and nothing is written."""
    name, layer = next(iter(linear_layers(loaded.model).items()))
    first = np.array([float(layer.weight.flatten()[0])], np.float32)
    matrix = MaskedMatrix(name, tuple(layer.weight.shape), np.zeros(1, np.uint32), first, np.zeros(1, np.float32))
    return Mask((matrix,), loaded.fingerprint, loaded.tokenizer_fingerprint)
