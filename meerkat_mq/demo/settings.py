"""The hyper-parameters of a demo: of its own model, chosen by measurement, and of a model that it is given."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from meerkat_mq.config import EarlyStoppingConfig

WEIGHTS: Final = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class DemoSettings:
    """One run of the demo; the defaults are for its own model.

    Attributes:
        density: share of each linear matrix that is tuned: the method's own default suffices.
        lr: a third of the rate at which training diverges.
        eps: in float32 as good as the usual 1e-3, at which a bfloat16 model breaks down after 150 rounds: rounding
            drowns the difference of the two losses.
        batch: rows a step.
        directions: P, or one for each node where that is fewer: a lane for each node learns faster than one for all
            and costs as many passes.
        rounds: enough to come within four points of the first-order bound; with more local steps as many fewer.
        early_stopping: calibrates until the demo's one label is learnt: nine of nine paths of that label were over the
            thresholds, none of six with a mix. A label that the base model knows already is not found.
        training_rows: over all nodes.
        calibration_sequences: of `calibration_tokens` tokens each; the mask of 64 sequences learns far slower.
        bound_steps: of first-order training with `bound_lr` on the same mask, for comparison.
    """

    density: float = 1e-3
    lr: float = 0.1
    eps: float = 1e-2
    batch: int = 16
    directions: int = 4
    rounds: int = 300
    training_rows: int = 1600
    held_out_rows: int = 1000
    calibration_sequences: int = 256
    calibration_tokens: int = 128
    calibration_lines: int = 12_000
    bound_steps: int = 150
    bound_lr: float = 1e-2
    early_stopping: EarlyStoppingConfig = field(
        default_factory=lambda: EarlyStoppingConfig(
            calibration_steps=250, later=0.25, rho_later=2.0, rho_quiet=0.3, quiet=0.2
        )
    )


DEMO: Final = DemoSettings()
GIVEN: Final = DemoSettings(
    lr=1e-3,
    eps=1e-3,
    directions=1000,
    rounds=100,
    calibration_sequences=100,
    bound_steps=100,
    bound_lr=1e-3,
    early_stopping=EarlyStoppingConfig(),
)
# A large model on the demo's own lines: steps and evaluations are dear, and it has seen the words before.
OWN_LINES: Final = replace(GIVEN, lr=5e-4, batch=8, rounds=60, held_out_rows=200)
GIVEN_TEXT_TOKENS: Final = 512  # of a calibration sequence, where the text is not that of short rows
