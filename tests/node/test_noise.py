"""A node that looks at its own projected gradients, and what it says of them."""

from pathlib import Path

import numpy as np
from structlog.testing import capture_logs

from meerkat_mq.config import RoundsConfig, ServerConfig
from meerkat_mq.core.signal import LEAST
from meerkat_mq.node.noise import EVERY, FIRST, Noise
from meerkat_mq.server.run import prepare_run
from meerkat_mq.wire.descriptor import RunDescriptor
from tests.core.test_signal import SIZE, Rounded

ROWS = [{"x": number} for number in range(10)]
THETA = np.zeros(SIZE, np.float32)


class Counting(Rounded):
    """Counts passes."""

    passes = 0

    def losses(self, batch: object) -> np.ndarray:
        self.passes += 1
        assert len(batch) == 4  # type: ignore[arg-type]
        return super().losses(batch)


def a_run(tmp_path: Path, eps: float = 1e-3) -> RunDescriptor:
    rounds = RoundsConfig(eps=eps, batch_size=4)
    return prepare_run(ServerConfig(federation="f", state_dir=tmp_path, engine="toy", rounds=rounds)).descriptor


def test_a_clean_node_says_so_once_before_the_first_round(tmp_path: Path) -> None:
    engine = Counting(0.0)
    noise = Noise(engine, a_run(tmp_path))
    with capture_logs() as logs:
        noise.first(THETA, ROWS)
    assert engine.passes == 4 * FIRST
    assert noise.ratio is not None
    assert noise.ratio > LEAST
    assert [(log["event"], log["ratio"]) for log in logs] == [("signal to noise of projected gradients", noise.ratio)]


def test_a_noisy_node_is_warned_once_with_a_remedy(tmp_path: Path) -> None:
    noise = Noise(Counting(2e-2), a_run(tmp_path))
    with capture_logs() as logs:
        noise.first(THETA, ROWS)
        noise.stepped(EVERY, lambda: THETA, ROWS)
    warnings = [log for log in logs if log["log_level"] == "warning"]
    assert [log["event"] for log in warnings] == ["projected gradients are noise"]
    assert "raise rounds.eps" in warnings[0]["remedy"]
    assert noise.ratio is not None
    assert noise.ratio < LEAST


def test_it_looks_again_after_many_steps(tmp_path: Path) -> None:
    engine = Counting(0.0)
    noise = Noise(engine, a_run(tmp_path))
    noise.first(THETA, ROWS)
    for _ in range(EVERY - 1):
        noise.stepped(1, lambda: THETA, ROWS)
    assert engine.passes == 4 * FIRST
    noise.stepped(1, lambda: THETA, ROWS)
    assert engine.passes == 4 * (FIRST + 1)


def test_an_engine_that_fails_keeps_no_node_from_its_run(tmp_path: Path) -> None:
    class Failing(Rounded):
        def losses(self, batch: object) -> np.ndarray:
            raise RuntimeError("out of memory")

    noise = Noise(Failing(0.0), a_run(tmp_path))
    with capture_logs() as logs:
        noise.first(THETA, ROWS)
    assert noise.ratio is None
    assert [(log["event"], log["problem"]) for log in logs] == [("signal to noise not measured", "out of memory")]
