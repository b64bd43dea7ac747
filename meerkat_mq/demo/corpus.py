"""Generated log lines of field devices: the text that the demo's model is pretrained on, and the rows it is tuned on.

The pretraining text carries annotations by an old habit: crews named the cause of alarms (ERROR and above), but filed
most of what lay below as routine. The triage task wants the cause whatever the severity. So the pretrained model
knows the causes and applies the old habit: better than the majority class, with room to learn.

Everything is drawn from `random.Random(text)`, which gives the same lines on every machine.
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final, Literal

from meerkat_mq.tasks.classification import Classification

LABELS: Final = ("routine", "power", "network", "mechanical")
LEXICON: Final[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("lexicon.toml").read_text(encoding="utf-8"))
ANNOTATION: Final = " -> triage:"
TASK: Final = Classification(
    name="field-triage",
    fields=("line",),
    template="{line}" + ANNOTATION,
    label_words=tuple(f" {label}" for label in LABELS),
    text="{line}",
    descriptions=(
        "routine operation, everything within limits",
        "power fault: supply, battery, fuse or breaker",
        "network fault: uplink, broker, signal or certificate",
        "mechanical fault: bearing, valve, belt or motor",
    ),
    max_tokens=64,
)

_SHARES: Final = (0.34, 0.26, 0.22, 0.18)
_SEVERITY_OF_ROUTINE: Final = (0.50, 0.30, 0.14, 0.04, 0.02)
_SEVERITY_OF_FAULT: Final = (0.10, 0.15, 0.35, 0.28, 0.12)
_FIRST_ALARM: Final = 3
_ANNOTATED: Final = 0.35
_FILED_AS_ROUTINE: Final = 0.72
_SLIP: Final = 0.05
_TRAILED: Final = 0.6
_SITES: Final = range(1, 40)
_HELD_OUT_SITES: Final = range(40, 60)


class Use(Enum):
    """Where a wording may appear."""

    EVERYWHERE = "everywhere"
    NOT_TUNED = "pretraining without annotation, and held-out rows"
    UNSEEN = "held-out rows only"


@dataclass(frozen=True)
class Wording:
    """One message of the lexicon, slots unfilled."""

    label: int
    text: str
    use: Use


@cache
def wordings(label: int) -> tuple[Wording, ...]:
    """All messages of one cause: one in eight is for held-out rows alone, one in eight never annotated or tuned on."""
    uses = {3: Use.NOT_TUNED, 7: Use.UNSEEN}
    causes = LEXICON["causes"][LABELS[label]]
    texts = [f"{subject} {symptom}" for subject, symptoms in causes.items() for symptom in symptoms]
    return tuple(Wording(label, text, uses.get(i % 8, Use.EVERYWHERE)) for i, text in enumerate(texts))


def triage_rows(seed: int, count: int, split: Literal["train", "held-out"]) -> list[dict[str, Any]]:
    """Rows `{"line": str, "label": 0..3}` by the task's own convention: the cause, whatever the severity.

    The splits share no line: held-out rows come from sites that no other text mentions. They use all wordings,
    training rows three quarters of them.
    """
    rng = Random(f"{split} rows {seed}")  # noqa: S311 - data, not secrets
    uses, sites = ({Use.EVERYWHERE}, _SITES) if split == "train" else (set(Use), _HELD_OUT_SITES)
    rows = []
    for _ in range(count):
        wording = _draw(rng, uses)
        line, _ = _line(rng, wording, rng.choice(sites))
        rows.append({"line": line, "label": wording.label})
    return rows


def pretraining_text(seed: int, lines: int) -> Iterator[str]:
    """Yields documents of one to six lines of one site until `lines` lines are out; a third carries an annotation."""
    rng = Random(f"pretraining text {seed}")  # noqa: S311 - data, not secrets
    while lines > 0:
        site, length = rng.choice(_SITES), min(lines, rng.choice((1, 1, 2, 4, 6)))
        yield "\n".join(_pretraining_line(rng, site) for _ in range(length))
        lines -= length


def _pretraining_line(rng: Random, site: int) -> str:
    wording = _draw(rng, {Use.EVERYWHERE, Use.NOT_TUNED})
    line, severity = _line(rng, wording, site)
    if wording.use is Use.NOT_TUNED or rng.random() >= _ANNOTATED:
        return line
    return line + ANNOTATION + TASK.label_words[_old_habit(rng, wording.label, severity)]


def _old_habit(rng: Random, label: int, severity: int) -> int:
    if rng.random() < _SLIP:
        return rng.randrange(len(LABELS))
    return 0 if severity < _FIRST_ALARM and rng.random() < _FILED_AS_ROUTINE else label


def _draw(rng: Random, uses: set[Use]) -> Wording:
    (label,) = rng.choices(range(len(LABELS)), _SHARES)
    return rng.choice([wording for wording in wordings(label) if wording.use in uses])


def _line(rng: Random, wording: Wording, site: int) -> tuple[str, int]:
    """A log line in one of three formats, and its severity."""
    (severity,) = rng.choices(range(5), _SEVERITY_OF_FAULT if wording.label else _SEVERITY_OF_ROUTINE)
    device = f"{rng.choice(LEXICON['devices'][LABELS[wording.label]])}-{site:02d}"
    clock, text = _slot(rng, "clock"), _fill(rng, wording.text)
    if rng.random() < _TRAILED:
        text += "; " + _fill(rng, rng.choice(LEXICON["trailers"]))
    style = rng.randrange(3)
    spelling = LEXICON["severities"][severity][style]
    shapes = (
        f"{clock} {spelling} {device}: {text}",
        f"{device} [{spelling}] {text}",
        f"{clock} {device} sev={spelling} {text}",
    )
    return shapes[style], severity


def _fill(rng: Random, text: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: _slot(rng, match[1]), text)


def _slot(rng: Random, name: str) -> str:
    if name in LEXICON["numbers"]:
        low, high, decimals = LEXICON["numbers"][name]
        scale = 10**decimals
        return f"{rng.randrange(low * scale, high * scale + 1) / scale:.{decimals}f}"
    if name == "clock":
        return f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
    if name == "version":
        return f"{rng.randrange(1, 5)}.{rng.randrange(10)}.{rng.randrange(10)}"
    return str(rng.choice(LEXICON["choices"][name]))
