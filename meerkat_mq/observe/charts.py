"""Charts as inline SVG: widths in percent and heights in px, so that text keeps its size on a phone.

Each `style` is a CSS class of `page.css`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from meerkat_mq.observe.markup import Markup, join, tag

HEIGHT = 240
MOST_POINTS = 600
MOST_DOTS = 40
COLOURS = 8

Point = tuple[float, float]


class Line(NamedTuple):
    """A curve; `dots` marks its points, too."""

    label: str
    style: str
    points: Sequence[Point]
    dots: bool = False


class Reference(NamedTuple):
    """A horizontal line with its label: above or below it, at its left or right end."""

    label: str
    style: str
    value: float
    below: bool = False
    left: bool = False


class Band(NamedTuple):
    """A stretch of the x axis that stands out."""

    label: str
    style: str
    begin: float
    end: float


class Bar(NamedTuple):
    """A bar on a log scale; `shown` is its value for people."""

    label: str
    style: str
    value: float
    shown: str


class Scale(NamedTuple):
    """A linear axis."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def nice_scale(values: Sequence[float]) -> Scale:
    """An axis over the values that begins and ends with a round tick."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low <= 1e-9 * abs(high):
        low, high = (low - abs(low) / 10, high) if high else (0.0, 1.0)
    step = _nice_step((high - low) / 4)
    first, last = math.floor(round(low / step, 6)), math.ceil(round(high / step, 6))
    ticks = tuple(round(index * step, 12) for index in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks)


def count_scale(last: int) -> Scale:
    """An axis from 0 to a count, with round ticks within."""
    high = max(1, last)
    step = max(1, round(_nice_step(high / 5)))
    return Scale(0, high, tuple(range(0, high + 1, step)))


def line_chart(
    title: str,
    lines: Sequence[Line],
    references: Sequence[Reference],
    x: Scale,
    show: Callable[[float], str],
    *,
    axis: str,
    bands: Sequence[Band] = (),
) -> Markup:
    """Curves over rounds, with reference lines.

    Args:
        title: for screen readers.
        show: a y value for people.
        axis: what x counts.
        bands: behind the curves.
    """
    y = nice_scale([*(value for line in lines for _, value in line.points), *(mark.value for mark in references)])
    plot = tag(
        "svg",
        tag("title", title),
        join(_band(x, band) for band in bands),
        join(_y_tick(y, value, show(value)) for value in y.ticks),
        *(
            tag("text", f"{at:,.0f}", x=_part(x.share(at)), y=HEIGHT + 20, text_anchor="middle", class_="tick")
            for at in x.ticks
        ),
        join(_reference_line(y, mark) for mark in references),
        tag("svg", join(_curve(x, y, line) for line in lines), viewBox=f"0 0 1000 {HEIGHT}", preserveAspectRatio="none",
            x=0, y=0, width="100%", height=HEIGHT),
        join(_dots(x, y, line, show) for line in lines if line.dots),
        join(_reference_label(y, mark) for mark in references),
        class_="plot", role="img", width="100%", height=HEIGHT,
    )  # fmt: skip
    return join([tag("div", plot, class_="plot-frame"), tag("p", axis, class_="axis")])


def stacked_bar(title: str, parts: Sequence[tuple[str, float]], whole: float) -> Markup:
    """One bar of coloured parts.

    Args:
        parts: label and size of each.
        whole: size of the full width.
    """
    left, drawn = 0.0, list[Markup]()
    for index, (label, size) in enumerate(parts):
        share = size / (whole or 1)
        if size:
            drawn.append(
                tag("rect", tag("title", f"{label}: {size:,}"), x=_part(left), y=0, width=_part(share),
                    height="100%", class_=f"part {colour(index)}")
            )  # fmt: skip
        left += share
    return tag("svg", tag("title", title), *drawn, class_="bar", role="img", width="100%", height=18)


def log_bars(bars: Sequence[Bar], show: Callable[[float], str]) -> Markup:
    """Bars on a common log scale, with its decades as a grid."""
    sizes = [bar.value for bar in bars if bar.value > 0]
    low = math.floor(math.log10(min(sizes, default=1)))
    high = max(low + 1, math.ceil(math.log10(max(sizes, default=10))))

    def share(value: float) -> str:
        return _part((math.log10(value) - low) / (high - low))

    every = math.ceil((high - low) / 5)
    decades = range(low, high + 1, every)
    grid = join(tag("line", x1=share(10.0**at), x2=share(10.0**at), y1=0, y2="100%", class_="grid") for at in decades)
    rows = (
        tag(
            "div",
            tag("div", tag("span", bar.label), tag("b", bar.shown), class_="bar-label"),
            tag(
                "svg", grid, tag("rect", width=share(max(bar.value, 10.0**low)), height="100%", class_=bar.style, rx=3),
                class_="bar", role="presentation", width="100%", height=14,
            ),
        )
        for bar in bars
    )  # fmt: skip
    ticks = (
        tag("text", show(10.0**at), x=share(10.0**at), y=14, class_="tick",
            text_anchor="start" if at == low else "end" if at + every > high else "middle")
        for at in decades
    )  # fmt: skip
    return tag("div", *rows, tag("svg", *ticks, class_="bar", width="100%", height=20), class_="bars")


def legend(entries: Sequence[tuple[str, str]], left_out: int = 0) -> Markup:
    """Label and CSS class of each colour, and how many more there are."""
    entries = [*entries, (f"… and {left_out:,} more", "none")] if left_out else entries
    items = (
        tag("li", tag("svg", tag("rect", width=12, height=12, rx=3, class_=style), width=12, height=12), f" {label}")
        for label, style in entries
    )
    return tag("ul", *items, class_="legend")


def colour(index: int, palette: Literal["c", "n"] = "c") -> str:
    """CSS class of the index-th colour: of classes, or of nodes, which are no classes and have other colours."""
    return f"{palette}{index % COLOURS}"


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most about `MOST_POINTS` of many points, the last among them."""
    stride = max(1, math.ceil(len(points) / MOST_POINTS))
    return points[(len(points) - 1) % stride :: stride]


def _nice_step(least: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(least))
    return next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= least * (1 - 1e-9))


def _part(share: float) -> str:
    """A place or width along the chart."""
    return f"{100 * share:.3f}%"


def _height(y: Scale, value: float) -> float:
    return round(HEIGHT * (1 - y.share(value)), 2)


def _y_tick(y: Scale, value: float, shown: str) -> Markup:
    at = _height(y, value)
    line = tag("line", x1=0, x2="100%", y1=at, y2=at, class_="grid")
    return join([line, tag("text", shown, x=-8, y=at + 4, text_anchor="end", class_="tick")])


def _band(x: Scale, band: Band) -> Markup:
    begin, width = x.share(band.begin), x.share(band.end) - x.share(band.begin)
    return tag("rect", tag("title", band.label), x=_part(begin), y=0, width=_part(width), height=HEIGHT,
               class_=f"band {band.style}")  # fmt: skip


def _curve(x: Scale, y: Scale, line: Line) -> Markup:
    points = " ".join(f"{1000 * x.share(at):.1f},{_height(y, value):.1f}" for at, value in thinned(line.points))
    return tag("polyline", points=points, class_=f"curve {line.style}")


def _dots(x: Scale, y: Scale, line: Line, show: Callable[[float], str]) -> Markup:
    chosen = line.points if len(line.points) <= MOST_DOTS else line.points[-1:]
    return join(
        tag("circle", tag("title", f"after {at:,.0f} rounds: {line.label} {show(value)}"),
            cx=_part(x.share(at)), cy=_height(y, value), r=3.5, class_=f"dot {line.style}")
        for at, value in chosen
    )  # fmt: skip


def _reference_line(y: Scale, mark: Reference) -> Markup:
    at = _height(y, mark.value)
    return tag("line", x1=0, x2="100%", y1=at, y2=at, class_=f"reference {mark.style}")


def _reference_label(y: Scale, mark: Reference) -> Markup:
    side = {"x": 6, "text_anchor": "start"} if mark.left else {"x": "99%", "text_anchor": "end"}
    height = _height(y, mark.value) + (16 if mark.below else -7)
    return tag("text", mark.label, y=height, class_=f"mark {mark.style}", **side)
