"""Getting the run's mask: kept from an earlier start, retained by the broker, or asked of the server."""

import asyncio
from collections.abc import Callable

import structlog

from meerkat_mq.core.mask import Mask
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.engines.registry import ENGINES
from meerkat_mq.errors import BadValue, WireError, shown
from meerkat_mq.mqtt import Session
from meerkat_mq.mqtt.blob_fetch import BlobFetch
from meerkat_mq.node.state import NodeState
from meerkat_mq.wire.arrays import Assembly, decode_mask
from meerkat_mq.wire.descriptor import MAY_CHANGE, RunDescriptor
from meerkat_mq.wire.topics import Topics


async def fetch_mask(
    descriptor: RunDescriptor,
    state: NodeState,
    session: Session,
    topics: Topics,
    begin: Callable[[bytes, int], BlobFetch],
) -> Mask:
    """The mask, however long it takes; asks the server for what the broker does not give.

    Args:
        begin: begins the fetch of a blob of this hash and size.
    """
    kept = await asyncio.to_thread(state.load_mask, descriptor.mask_hash)
    if kept is not None:
        return kept
    fetch = begin(descriptor.mask_name, descriptor.mask_bytes)
    filters = topics.blobs(descriptor.mask_name)
    session.subscribe(filters)
    try:
        mask = await _collect(fetch, descriptor)
    finally:
        session.unsubscribe(filters)
    await asyncio.to_thread(state.keep_mask, mask)
    return mask


async def _collect(fetch: BlobFetch, run: RunDescriptor) -> Mask:
    unasked, seldom = True, Seldom()
    while True:
        blob = await fetch.collect(unasked=unasked)
        try:
            return await asyncio.to_thread(decode_mask, blob, run.mask_hash, run.weights)
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
