"""Joining a run: is its descriptor one that a server can mean, and where does the mask come from?"""

from collections.abc import Callable
from functools import partial

import structlog

from meerkat_mq.core.mask import Mask
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.engines.registry import ENGINES, check_named
from meerkat_mq.errors import BadValue, RunMismatch, WireError, shown
from meerkat_mq.runtime.blobs import BlobFetch, Blobs
from meerkat_mq.runtime.model import NodeProfile, NodeStore
from meerkat_mq.runtime.policy import NodePolicy
from meerkat_mq.runtime.ports import Clock, Compute, Transport
from meerkat_mq.runtime.steps import Steps, work
from meerkat_mq.tasks.load import task_of
from meerkat_mq.wire.arrays import Assembly, decode_mask
from meerkat_mq.wire.descriptor import MAY_CHANGE, RunDescriptor
from meerkat_mq.wire.messages import Round
from meerkat_mq.wire.topics import Topics

LOST_S, LONGEST_S = 5.0, 300.0  # so long may a descriptor be on its way; between two tries in vain


def describes(run: RunDescriptor, frame: Round) -> bool:
    """Whether a round is of this run."""
    return frame.header.run == int.from_bytes(run.run_id[:4], "little")


class LostDescriptor:
    """Notices that rounds come of a run whose descriptor does not, and connects again: brokers say it to who comes."""

    def __init__(self, transport: Transport, clock: Clock) -> None:
        self._transport = transport
        self._clock = clock
        self._since: float | None = None
        self._wait_s = LOST_S

    def round_came(self, frame: Round, newest: RunDescriptor | None) -> None:
        """A round frame came; the newest descriptor may be of its run, or of another."""
        now = self._clock.now()
        if newest is not None and describes(newest, frame):
            self._since, self._wait_s = None, LOST_S
        elif self._since is None:
            self._since = now
        elif now - self._since >= self._wait_s:
            self._since, self._wait_s = now, min(2 * self._wait_s, LONGEST_S)
            structlog.get_logger().warning("rounds of a run that was not described, connecting again")
            self._transport.renew()


def get_mask(
    run: RunDescriptor,
    blobs: Blobs,
    *,
    policy: NodePolicy,
    store: NodeStore,
    compute: Compute,
    transport: Transport,
    topics: Topics,
) -> Steps[Mask]:
    """The mask, however long it takes: kept from an earlier start, retained by the broker, or asked of the server.

    Raises:
        SpentToday: the node may fetch no more today.
    """
    count = partial(policy.count_fetch, run.mask_bytes, store)

    def look() -> Mask | None:
        if (found := store.load_mask(run.mask_hash)) is None:
            count()
        return found

    kept = yield from work(compute, look)
    if kept is not None:
        return kept
    fetch, filters = blobs.begin(run.mask_name, run.mask_bytes), topics.blob(run.mask_name, "+")
    transport.subscribe(filters)
    try:
        mask = yield from _collect(fetch, run, compute, count)
    finally:
        transport.unsubscribe(filters)
        blobs.end()
    yield from work(compute, store.keep_mask, mask)
    return mask


def _collect(fetch: BlobFetch, run: RunDescriptor, compute: Compute, count: Callable[[], None]) -> Steps[Mask]:
    unasked, seldom = True, Seldom()
    while True:
        blob = yield from fetch.collect(unasked=unasked)
        try:
            return (yield from work(compute, decode_mask, blob, run.mask_hash, run.weights))
        except WireError as error:
            seldom.say(structlog.get_logger().warning, "mask refused, fetching it again", problem=str(error))
            yield from work(compute, count)
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


def check_profile(run: RunDescriptor, profile: NodeProfile) -> None:
    """Refuse, as RunMismatch, a run for which this node was not set up."""
    if profile.values and not run.values:
        problem = f'is "values", but run {run.run[:8]} takes projected gradients only'
        raise RunMismatch("uplink", problem, 'set uplink = "path" here, or values.accept = true on the server')
    check_named(run.engine, profile.engine)


def check_changes(known: RunDescriptor, descriptor: RunDescriptor) -> None:
    """Refuse, as WireError, another descriptor of the same run that changes what no server may change."""
    before, after = known.model_dump(), descriptor.model_dump()
    for key in before.keys() - MAY_CHANGE:
        if before[key] != after[key]:
            raise BadValue(
                f"RunDescriptor.{key}", f"was {shown(before[key])}, and is {shown(after[key])} in the same run"
            )
