"""The figure that a run is judged by: what a task's figures are called, and how they are shown and compared."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from meerkat_mq.observe.figures import percent, points


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure of evaluations.

    Attributes:
        key: among an evaluation's figures.
        words: what people call it.
        share: whether it is a share, and better if it is larger; else it is a number, and better if it is smaller.
    """

    key: str
    words: str
    share: bool

    def shown(self, value: float) -> str:
        """A value: "58.1 %", "12.34"."""
        return percent(value) if self.share else f"{value:,.2f}"

    def change(self, before: float, after: float) -> str:
        """What was gained: "+30.3 points", "−12.5 %"."""
        if self.share:
            return points(after - before)
        return f"{100 * (after / before - 1):+.1f} %".replace("-", "−")

    def better(self, value: float, than: float) -> bool:
        """Whether a value is better than another."""
        return value > than if self.share else value < than


ACCURACY: Final = Measure("accuracy", "accuracy", share=True)
PERPLEXITY: Final = Measure("perplexity", "perplexity", share=False)
BESIDE: Final = {  # figures that stand beside the one by which a run is judged, all of them shares
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "token_accuracy": "tokens right",
    "exact_match": "exact matches",
}


def measure_of(figures: Mapping[str, Any]) -> Measure | None:
    """By what figures are to be judged; None where none of them is known: a loss says too little."""
    return next((measure for measure in (ACCURACY, PERPLEXITY) if _known(figures.get(measure.key))), None)


def _known(value: object) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def beside(figures: Mapping[str, float]) -> str:
    """The other figures, in words: "balanced accuracy 80.1 %, macro-F1 79.3 %"; "" without any."""
    return ", ".join(f"{words} {percent(figures[key])}" for key, words in BESIDE.items() if key in figures)
