"""The node's worker holds nothing of a model that nobody uses any more."""

import asyncio
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from meerkat_mq.config import LimitsConfig
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.node.limits import Allowance, NodeCompute
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.loop import Ports
from tests.runtime.one_node import PaperModel, descriptor

ORDER = StartSteps(version=0, steps=1, lane=0, eps=0.1)


@pytest.mark.parametrize("stopped", [False, True])
async def test_a_model_goes_with_its_run_before_there_is_another(stopped: bool) -> None:
    mask, over = toy_mask(10), asyncio.Event()
    model = PaperModel(descriptor(mask), mask)
    gone = weakref.ref(model)
    with ThreadPoolExecutor(1) as worker:
        compute = NodeCompute(Ports(), worker, Allowance(LimitsConfig()))
        running = asyncio.create_task(compute.run_steps())
        compute.steps(model, ORDER, lambda _: over.set(), lambda _: None)
        if stopped:
            compute.stop_steps()
        del model
        await over.wait()
        await asyncio.to_thread(worker.submit(int).result)  # its thread has let go
        await asyncio.sleep(0)
        assert gone() is None
        running.cancel()
