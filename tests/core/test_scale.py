"""The size of a mask's weights, by which the longest step of a run is measured: the same bits everywhere."""

import math

import numpy as np
import pytest

from meerkat_mq.core.directions import direction
from meerkat_mq.core.gradip import root_mean_square
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.core.path import Coefficient, Entry, check_steps
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.errors import BadValue


def mask_of(*values: float) -> Mask:
    theta_0 = np.array(values, np.float32)
    indices, g_p = np.arange(theta_0.size, dtype=np.uint32), np.zeros_like(theta_0)
    return Mask((MaskedMatrix("w", (theta_0.size,), indices, theta_0, g_p),), bytes(32), bytes(32))


@pytest.mark.parametrize(
    ("values", "scale"),
    [((3.0, -3.0), 3.0), ((3.0, 0.0, 0.0, -3.0), 3.0), ((0.0, 0.0), 1.0), ((1e-30,), float(np.float32(1e-30)))],
)
def test_the_size_of_weights_leaves_zeros_out(values: tuple[float, ...], scale: float) -> None:
    """Half of an adapter begins at zero, and the toy engine's weights all do."""
    assert mask_of(*values).scale == pytest.approx(scale, rel=1e-15)
    assert toy_mask(9).scale == 1.0


def test_the_root_mean_square_has_one_order() -> None:
    values = direction("mk1", 5, 0, 1001)
    exact = math.sqrt(math.fsum(float(x) ** 2 for x in values) / values.size)
    assert root_mean_square(values) == pytest.approx(exact, rel=1e-14)
    assert root_mean_square(values).hex() == "0x1.0bbf7ede6a93cp+0"
    assert values.tobytes() == direction("mk1", 5, 0, 1001).tobytes()


def test_an_entry_with_a_longer_step_than_the_run_has_is_refused() -> None:
    bound = 0.1  # a coefficient at the bound is rounded up to float32
    at_the_bound, over = (
        Entry(7, (Coefficient(0, 0, float(np.float32(c))),), bytes(16), bytes(16)) for c in (0.1, -0.1001)
    )
    check_steps(at_the_bound, bound)
    with pytest.raises(BadValue, match=r"-0\.1001.* in entry 7 is over the run's max_step, 0\.1"):
        check_steps(over, bound)
