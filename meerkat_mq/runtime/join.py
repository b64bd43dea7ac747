"""Joining a run: is its descriptor one that a server can mean, and where does the mask come from?"""

import structlog

from meerkat_mq.core.mask import Mask
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.engines.registry import ENGINES
from meerkat_mq.errors import BadValue, WireError, shown
from meerkat_mq.runtime.blobs import BlobFetch, Blobs
from meerkat_mq.runtime.model import NodeStore
from meerkat_mq.runtime.ports import Compute, Transport
from meerkat_mq.runtime.steps import Steps, work
from meerkat_mq.tasks.load import task_of
from meerkat_mq.wire.arrays import Assembly, decode_mask
from meerkat_mq.wire.descriptor import MAY_CHANGE, RunDescriptor
from meerkat_mq.wire.topics import Topics


def get_mask(
    run: RunDescriptor, blobs: Blobs, *, store: NodeStore, compute: Compute, transport: Transport, topics: Topics
) -> Steps[Mask]:
    """The mask, however long it takes: kept from an earlier start, retained by the broker, or asked of the server."""
    kept = yield from work(compute, store.load_mask, run.mask_hash)
    if kept is not None:
        return kept
    fetch, filters = blobs.begin(run.mask_name, run.mask_bytes), topics.blob(run.mask_name, "+")
    transport.subscribe(filters)
    try:
        mask = yield from _collect(fetch, run, compute)
    finally:
        transport.unsubscribe(filters)
        blobs.end()
    yield from work(compute, store.keep_mask, mask)
    return mask


def _collect(fetch: BlobFetch, run: RunDescriptor, compute: Compute) -> Steps[Mask]:
    unasked, seldom = True, Seldom()
    while True:
        blob = yield from fetch.collect(unasked=unasked)
        try:
            return (yield from work(compute, decode_mask, blob, run.mask_hash, run.weights))
        except WireError as error:
            seldom.say(structlog.get_logger().warning, "mask refused, fetching it again", problem=str(error))
            fetch.start_over()
            unasked = False


def check_descriptor(descriptor: RunDescriptor, federation: str) -> None:
    """Refuse, as WireError, a descriptor that no server can mean."""
    if descriptor.federation != federation:
        raise BadValue("RunDescriptor.federation", f"{descriptor.federation} is not {federation}")
    engine = ENGINES.get(descriptor.engine)
    if engine is not None and engine.task == "needed" and descriptor.task is None:
        raise BadValue("RunDescriptor.task", "is missing")
    if descriptor.task is not None:
        task_of(descriptor.task)
    if descriptor.mask_bytes > 16 * descriptor.weights + 2**20:
        raise BadValue("RunDescriptor.mask_bytes", f"{descriptor.mask_bytes} bytes for {descriptor.weights} weights")
    Assembly(descriptor.mask_name, descriptor.mask_bytes, descriptor.mask_chunks)


def check_changes(known: RunDescriptor, descriptor: RunDescriptor) -> None:
    """Refuse, as WireError, another descriptor of the same run that changes what no server may change."""
    before, after = known.model_dump(), descriptor.model_dump()
    for key in before.keys() - MAY_CHANGE:
        if before[key] != after[key]:
            raise BadValue(
                f"RunDescriptor.{key}", f"was {shown(before[key])}, and is {shown(after[key])} in the same run"
            )
