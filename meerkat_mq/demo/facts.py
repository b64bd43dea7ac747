"""What the demo knows of its run beyond the ledger."""

from collections.abc import Sequence
from typing import Any

from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row
from meerkat_mq.demo.local import LocalResult, node_name
from meerkat_mq.demo.plan import DemoPlan
from meerkat_mq.observe.facts import Facts, NodeFacts
from meerkat_mq.tasks.data import class_counts
from meerkat_mq.tasks.task import Task


def facts_before(plan: DemoPlan, mask: Mask, parameters: int) -> Facts:
    """What is known before the run starts: the model, and the rows of each node."""
    return Facts(
        mask=mask.hash.hex(),
        model=plan.name,
        parameters=parameters,
        covered=mask.covered,
        classes=tuple(plan.task.classes),
        nodes={
            node_name(number): NodeFacts(labels=_labels(plan.task, rows)) for number, rows in enumerate(plan.shards)
        },
    )


def _labels(task: Task, rows: Sequence[Row]) -> tuple[int, ...]:
    return tuple(class_counts(rows, task))


def facts_after(facts: Facts, plan: DemoPlan, result: LocalResult) -> Facts:
    """And after it: how it ended, and what each node said last."""
    finished = result.finished
    assert finished is not None
    nodes = {name: _node(name, facts.nodes[name], result) for name in map(node_name, range(len(plan.shards)))}
    known = {"run": result.run, "digest": finished.digest, "seconds": finished.seconds, "nodes": nodes}
    return facts.model_copy(update={**known, "counts": dict(finished.counts)})


def _node(name: str, facts: NodeFacts, result: LocalResult) -> NodeFacts:
    words: dict[str, Any] = result.node_reports[name]
    assert result.finished is not None
    updates = result.finished.updates.get(name)
    known = {
        "payload_bytes": updates.payload_bytes if updates else None,
        "packet_bytes": updates.packet_bytes if updates else None,
        "sent_bytes": words.get("sent_bytes"),
        "received_bytes": words.get("received_bytes"),
        "peak_rss_mib": words.get("peak_rss_mib"),
        "digest": words.get("digest") or "",
    }
    return facts.model_copy(update=known)
