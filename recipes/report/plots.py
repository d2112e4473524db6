"""Plots of the report as inline SVG.

Positions are percentages and text keeps its size, so a plot fits a phone and a printed page alike;
colours are CSS classes, so it follows the reader's dark or light setting. A drawing library's SVG
can do neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from markupsafe import Markup

Point = tuple[float, float]
MAX_POINTS = 500
"""More points than this per line cannot be seen, and would make the file large."""
SMOOTHING = 30
"""A line of at least twice this many points is also drawn as a mean over 1/30 of its length."""
MAX_MARKERS = 40
SKEW = 8
"""Scores whose largest is more than this many times the median are drawn on a log scale."""

FRAME = Markup(
    '<svg id="{name}" class="plot" role="img" aria-label="{title}" style="height:{height}px">'
    "{body}</svg>"
)
TICK_Y = Markup(
    '<line class="grid" x1="0" x2="100%" y1="{at}%" y2="{at}%"/>'
    '<text class="tick" x="0" y="{at}%" dx="-8" dy=".35em" text-anchor="end">{label}</text>'
)
TICK_X = Markup(
    '<text class="tick" x="{at}%" y="100%" dy="18" text-anchor="{anchor}">{label}</text>'
)
_LINE = Markup(
    '<svg width="100%" height="100%" viewBox="0 0 1000 1000" preserveAspectRatio="none" '
    'class="over"><polyline class="line {style}" points="{points}"/></svg>'
)
_MARKER = Markup(
    '<circle class="dot {style}" cx="{x}%" cy="{y}%" r="3.5"><title>{hint}</title></circle>'
)
_BAR = Markup(
    '<rect class="bar {style}" x="{x}%" y="{y}%" width="{width}%" height="{height}%">'
    "<title>{hint}</title></rect>"
)
_COLUMN = Markup('<line class="grid" x1="{at}%" x2="{at}%" y1="0" y2="100%"/>')
_BAND = Markup('<line class="won" x1="{low}%" x2="{high}%" y1="{y}%" y2="{y}%"/>')
_INTERVAL = Markup(
    '<line class="drop {style}" x1="{at}%" x2="{at}%" y1="{y}%" y2="100%"/>'
    '<line class="whisker {style}" x1="{low}%" x2="{high}%" y1="{y}%" y2="{y}%"/>'
    '<circle class="dot {style}" cx="{at}%" cy="{y}%" r="6"><title>{hint}</title></circle>'
    '<text class="mark" x="{at}%" y="{y}%" dy="-14" text-anchor="{anchor}">{text}</text>'
    '<text class="row" x="0" y="{y}%" dx="-12" dy=".35em" text-anchor="end">{label}</text>'
)


@dataclass(frozen=True)
class Series:
    """One line of a plot; ``style`` is its CSS class."""

    label: str
    style: str
    points: Sequence[Point]
    noisy: bool = True
    """Whether a moving mean says more than the points alone."""


@dataclass(frozen=True)
class Axis:
    """A scale from ``low`` to ``high``, which are the ends' logarithms if it is logarithmic."""

    low: float
    high: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Position of a value, in percent from the low end."""
        place = math.log10(value) if self.logarithmic else value
        return round(100 * (place - self.low) / (self.high - self.low), 3)

    def ticks(self, wanted: int = 5) -> list[float]:
        """About ``wanted`` round values inside the axis."""
        if self.logarithmic:
            found = self._of_decades()
            return found if len(found) > 1 else Axis(10**self.low, 10**self.high).ticks(wanted)
        rough = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]

    def _of_decades(self) -> list[float]:
        """1, 2 and 5 in every decade; powers of ten alone if there are many."""
        steps = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        values = [step * 10.0**decade for decade in decades for step in steps]
        return [v for v in values if self.low <= math.log10(v) <= self.high]


def axis_over(
    values: Iterable[float], *, zero: bool = False, pad: float = 0.06, logarithmic: bool = False
) -> Axis:
    """An axis that holds all values with some room; from zero where lengths are compared."""
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = (math.log10(v) if logarithmic else v for v in (min(finite), max(finite)))
    room = (high - low) * pad or abs(high) * pad or 1.0
    return Axis(min(0.0, low) if zero else low - room, high + room, logarithmic)


def columns(across: Axis, wanted: int, write: Callable[[float], str]) -> Markup:
    """Labelled lines up from round values of an axis."""
    return Markup("").join(
        _COLUMN.format(at=across.at(v))
        + TICK_X.format(at=across.at(v), anchor=_anchor(across.at(v)), label=write(v))
        for v in across.ticks(wanted)
    )


def _anchor(at: float) -> str:
    """Labels at the ends grow inwards, or they would stick out of a narrow page."""
    return "start" if at < 2 else "end" if at > 96 else "middle"


def number(value: float, digits: int = 6) -> str:
    """A number as short as it can be; small ones with an exponent."""
    text = f"{value:.{digits}g}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text.replace("-", "−")


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Centred moving mean; shorter at both ends, so that no point is lost."""
    reach = max(1, len(points) // SMOOTHING // 2)
    sums = [0.0, *accumulate(y for _, y in points)]
    spans = ((max(0, i - reach), min(len(points), i + reach + 1)) for i in range(len(points)))
    return [(points[i][0], (sums[b] - sums[a]) / (b - a)) for i, (a, b) in enumerate(spans)]


def line_plot(
    name: str, title: str, series: Sequence[Series], *, height: int = 220, zero: bool = False
) -> Markup:
    """Lines over training steps; noisy ones pale, with their moving mean on top."""
    across = Axis(0.0, max((x for s in series for x, _ in s.points), default=0.0) or 1.0)
    up = axis_over((y for s in series for _, y in s.points), zero=zero)
    rows = [TICK_Y.format(at=100 - up.at(v), label=number(v)) for v in up.ticks(4)]
    ticks = [
        TICK_X.format(at=across.at(v), anchor=_anchor(across.at(v)), label=f"{v:,.6g}")
        for v in across.ticks(4)
    ]
    body = Markup("").join(rows + ticks)
    for one in series:
        if one.noisy and len(one.points) >= 2 * SMOOTHING:
            body += _line(one.points, f"{one.style} raw", across, up)
            body += _line(smoothed(one.points), one.style, across, up)
        else:
            body += _line(one.points, one.style, across, up)
        if len(one.points) <= MAX_MARKERS:
            body += _markers(one, across, up)
    return FRAME.format(name=name, title=title, height=height, body=body)


def _line(points: Sequence[Point], style: str, across: Axis, up: Axis) -> Markup:
    """At most about ``MAX_POINTS`` of the points, the last one always among them."""
    stride = max(1, math.ceil(len(points) / MAX_POINTS))
    pairs = (
        f"{10 * across.at(x):.1f},{1000 - 10 * up.at(y):.1f}"
        for x, y in [*points[:-1:stride], *points[-1:]]
        if math.isfinite(y)
    )
    return _LINE.format(style=style, points=" ".join(pairs))


def _markers(one: Series, across: Axis, up: Axis) -> Markup:
    return Markup("").join(
        _MARKER.format(
            style=one.style,
            x=across.at(x),
            y=100 - up.at(y),
            hint=f"step {x:g}: {one.label} {y:.4g}",
        )
        for x, y in one.points
    )


def is_skewed(scores: Iterable[float]) -> bool:
    """Whether the largest score would flatten the rest; the first layer's often does."""
    ordered = sorted(scores)
    return ordered[0] > 0 and ordered[-1] > SKEW * ordered[len(ordered) // 2]


def layer_plot(name: str, title: str, scores: Mapping[int, float], kept: set[int]) -> Markup:
    """One bar per layer, numbered from 1; dropped layers are hollow; logarithmic when skewed."""
    skewed = is_skewed(scores.values())
    lowest = min(scores.values()) / 2 if skewed else 0.0
    up = axis_over([lowest, *scores.values()], logarithmic=skewed)
    up = replace(up, low=math.log10(lowest) if skewed else 0.0)  # bars stand on it
    slot, last = 100 / max(scores), max(scores)
    every = next(n for n in (1, 2, 5, 10, 20, last) if last / n <= 12)
    body = Markup("").join(TICK_Y.format(at=100 - up.at(v), label=number(v)) for v in up.ticks(4))
    for layer, score in sorted(scores.items()):
        fate, height = "kept" if layer in kept else "dropped", max(0.0, up.at(score))
        body += _BAR.format(
            style=fate,
            x=round((layer - 0.85) * slot, 3),
            y=round(100 - height, 3),
            width=round(0.7 * slot, 3),
            height=height,
            hint=f"layer {layer}, {fate}: {score:.6g}",
        )
        if layer % every == 0 or layer == 1:
            body += TICK_X.format(at=round((layer - 0.5) * slot, 3), anchor="middle", label=layer)
    return FRAME.format(name=name, title=title, height=200, body=body)


def interval_plot(name: str, title: str, rows: Sequence[tuple[str, str, float, float]]) -> Markup:
    """Values with their standard errors on one scale; rows are (label, style, value, error).

    A band in the last row shows how far it came from the row before; lines down from every point
    let the eye compare that with the others.
    """
    across = axis_over((v + s * e for _, _, v, e in rows for s in (-1, 1)), pad=0.1)
    body = columns(across, 5, number)
    heights = [round(100 * (index + 0.56) / len(rows), 2) for index in range(len(rows))]
    if len(rows) > 2:
        start, end = (across.at(value) for _, _, value, _ in rows[-2:])
        body += _BAND.format(low=start, high=end, y=heights[-1])
    for y, (label, style, value, error) in zip(heights, rows, strict=True):
        at = across.at(value)
        body += _INTERVAL.format(
            style=style,
            at=at,
            y=y,
            low=across.at(value - error),
            high=across.at(value + error),
            anchor="start" if at < 6 else "end" if at > 94 else "middle",
            label=label,
            text=f"{value:.3f}",
            hint=f"{label}: {value:.4f} ± {error:.4f}",
        )
    return FRAME.format(name=name, title=title, height=58 * len(rows), body=body)


def percent(share: float) -> float:
    """A share as a length that stays within its place."""
    return round(100 * min(max(share, 0.0), 1.0), 2)


def share_bar(share: float, style: str = "") -> Markup:
    """A small horizontal bar for a table cell."""
    return Markup(
        '<svg class="share" aria-hidden="true"><rect class="track" width="100%" height="100%"/>'
        '<rect class="fill {style}" width="{width}%" height="100%"/></svg>'
    ).format(style=style, width=percent(share))
