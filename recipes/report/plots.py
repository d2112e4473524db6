"""Draws the report's plots as inline SVG.

Positions are percentages and text has a fixed size, so a plot fits a phone and a printed page.
Colours are CSS classes, so a plot follows the reader's light or dark setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from markupsafe import Markup

from recipes.core.statistics import pareto_front

Point = tuple[float, float]
MAX_POINTS = 500
"""Maximum number of points per line. More points cannot be seen and would make the file large."""
MAX_MARKERS = 40
"""A line with at most this many points has a marker at each point."""
SMOOTHING = 30
"""A moving mean covers 1/30 of a line's points. It is drawn if the line has at least 60 points."""
SKEW = 8
"""A scale is logarithmic if the largest value exceeds this many times the median."""
ROW_PIXELS = 46
"""Height of a row in a plot of intervals. A row has up to three intervals, one per model."""
LABEL_DISTANCE = 4
"""Points closer than this, in percent of the plot, share a label: their labels would overlap."""
MAX_ROW_LABEL = 15
"""Characters of a row's label that fit the margin beside the plot. Longer labels are shortened."""
MAX_VALUE = 1e100
"""Larger values are not drawn, because ticks near the largest float would overflow."""

_FRAME = Markup(
    '<svg id="{name}" class="plot" role="img" aria-label="{title}" style="height:{height}px">'
    "{body}</svg>"
)
_Y_TICK = Markup(
    '<line class="grid" x1="0" x2="100%" y1="{at}%" y2="{at}%"/>'
    '<text class="tick" x="0" y="{at}%" dx="-8" dy=".35em" text-anchor="end">{label}</text>'
)
_X_TICK = Markup(
    '<text class="tick" x="{at}%" y="100%" dy="18" text-anchor="{anchor}">{label}</text>'
)
_X_GRID = Markup('<line class="grid" x1="{at}%" x2="{at}%" y1="0" y2="100%"/>')
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
_ROW = Markup(
    '<text class="row" x="0" y="{y}%" dx="-12" dy=".35em" text-anchor="end">{label}'
    "<title>{name}</title></text>"
)
_INTERVAL = Markup(
    '<line class="whisker {style}" x1="{low}%" x2="{high}%" y1="{y}%" y2="{y}%"/>'
    '<circle class="dot {style}" cx="{at}%" cy="{y}%" r="4.5"><title>{hint}</title></circle>'
)
_MODEL_MARK = Markup(
    '<line class="whisker {style}" x1="{x}%" x2="{x}%" y1="{high}%" y2="{low}%"/>'
    '<circle class="dot {style}" cx="{x}%" cy="{y}%" r="{radius}"><title>{hint}</title></circle>'
    '<text class="mark" x="{x}%" y="{y}%" dx="{dx}" dy="-9" text-anchor="{anchor}">{label}</text>'
)
_FRONT = Markup('<line class="front" x1="{x1}%" x2="{x2}%" y1="{y1}%" y2="{y2}%"/>')


@dataclass(frozen=True)
class Series:
    """One line of a plot; ``style`` is its CSS class."""

    label: str
    style: str
    points: Sequence[Point]
    noisy: bool = True
    """Whether the points are drawn pale, with their moving mean on top."""


@dataclass(frozen=True)
class Axis:
    """A scale from ``low`` to ``high``; if ``logarithmic``, both are log10 of the values there."""

    low: float
    high: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Returns the position of a value in percent, measured from the low end."""
        position = math.log10(value) if self.logarithmic else value
        return round(100 * (position - self.low) / (self.high - self.low), 3)

    def ticks(self, count: int = 5) -> list[float]:
        """Returns about ``count`` round values within the axis."""
        if self.logarithmic:
            values = self._decade_ticks()
            # With fewer than two values, the ticks are evenly spaced, as on a linear axis.
            return values if len(values) > 1 else Axis(10**self.low, 10**self.high).ticks(count)
        exact_step = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(exact_step))
        # The step is the next larger round number. 0.999 and 1e-9 tolerate rounding errors.
        step = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= exact_step * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]

    def _decade_ticks(self) -> list[float]:
        """Returns 1, 2 and 5 of every decade; from 2.5 decades on, only powers of ten."""
        steps = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        values = [step * 10.0**decade for decade in decades for step in steps]
        return [v for v in values if self.low <= math.log10(v) <= self.high]


def axis_over(
    values: Iterable[float], *, zero: bool = False, pad: float = 0.06, logarithmic: bool = False
) -> Axis:
    """Returns an axis that covers all finite values with a margin.

    Args:
        values: Values to cover. For a logarithmic scale, all must be positive.
        zero: Whether the axis includes zero, without a margin below it.
        pad: Margin at each end, as a fraction of the range of the values.
        logarithmic: Whether the scale is logarithmic.
    """
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = (math.log10(v) if logarithmic else v for v in (min(finite), max(finite)))
    # An axis needs a length, but equal values have no range. Then their size sets the margin.
    margin = (high - low) * pad or abs(high) * pad or 1.0
    return Axis(min(0.0, low) if zero else low - margin, high + margin, logarithmic)


def is_skewed(values: Iterable[float]) -> bool:
    """Returns whether all values are positive and the largest exceeds ``SKEW`` times the median."""
    ordered = sorted(values)
    return ordered[0] > 0 and ordered[-1] > SKEW * ordered[len(ordered) // 2]


def number(value: float, digits: int = 6) -> str:
    """Formats a number with ``digits`` significant digits; below 0.001 with an exponent."""
    text = f"{value:.{digits}g}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text.replace("-", "−")


def frame(name: str, title: str, height: int, *elements: Markup) -> Markup:
    """Returns a whole plot with HTML id ``name`` and a height in pixels."""
    return _FRAME.format(name=name, title=title, height=height, body=Markup("").join(elements))


def y_grid(axis: Axis, text_of: Callable[[float], str] = number) -> Markup:
    """Returns horizontal grid lines; ``text_of`` formats their labels."""
    lines = (_Y_TICK.format(at=100 - axis.at(v), label=text_of(v)) for v in axis.ticks(4))
    return Markup("").join(lines)


def x_grid(axis: Axis, count: int, text_of: Callable[[float], str]) -> Markup:
    """Returns about ``count`` vertical grid lines; ``text_of`` formats their labels."""
    positions = ((axis.at(value), text_of(value)) for value in axis.ticks(count))
    return Markup("").join(_X_GRID.format(at=at) + _x_tick(at, text) for at, text in positions)


def _x_tick(at: float, label: object) -> Markup:
    """Returns a label below the plot, at ``at`` percent of its width."""
    # A label near an end of the plot is aligned inwards.
    anchor = "start" if at < 2 else "end" if at > 96 else "middle"
    return _X_TICK.format(at=at, anchor=anchor, label=label)


@dataclass(frozen=True)
class Dimension:
    """What an axis shows, and how its values are formatted."""

    title: str
    text_of: Callable[[float], str] = number
    higher_is_better: bool = False


STEPS = Dimension("step", "{:,.6g}".format)


def line_plot(
    name: str,
    title: str,
    series: Sequence[Series],
    *,
    height: int = 220,
    zero: bool = False,
    x_dimension: Dimension = STEPS,
) -> Markup:
    """Draws lines in a plot of ``height`` pixels. If ``zero`` is set, the y axis includes zero."""
    x_axis = Axis(0.0, max((x for s in series for x, _ in s.points), default=0.0) or 1.0)
    y_axis = axis_over((y for s in series for _, y in s.points), zero=zero)
    elements = [y_grid(y_axis), x_grid(x_axis, 4, x_dimension.text_of)]
    for line in series:
        main_points = line.points
        if line.noisy and len(line.points) >= 2 * SMOOTHING:
            elements.append(_line(line.points, f"{line.style} raw", x_axis, y_axis))
            main_points = _moving_mean(line.points)
        elements.append(_line(main_points, line.style, x_axis, y_axis))
        if len(line.points) <= MAX_MARKERS:
            elements += [
                _MARKER.format(
                    style=line.style,
                    x=x_axis.at(x),
                    y=100 - y_axis.at(y),
                    hint=f"{x_dimension.title} {x_dimension.text_of(x)}: {line.label} {y:.4g}",
                )
                for x, y in line.points
            ]
    return frame(name, title, height, *elements)


def _moving_mean(points: Sequence[Point]) -> list[Point]:
    """Returns the centred moving mean of all points. The window is shorter at both ends."""
    reach = max(1, len(points) // SMOOTHING // 2)  # half of the window
    sums = [0.0, *accumulate(y for _, y in points)]  # at index i: the sum of the first i values
    means = []
    for i, (x, _) in enumerate(points):
        start, end = max(0, i - reach), min(len(points), i + reach + 1)
        means.append((x, (sums[end] - sums[start]) / (end - start)))
    return means


def _line(points: Sequence[Point], style: str, x_axis: Axis, y_axis: Axis) -> Markup:
    """Draws at most about ``MAX_POINTS`` evenly spaced points, and always the last point."""
    stride = max(1, math.ceil(len(points) / MAX_POINTS))
    drawn_points = [*points[:-1:stride], *points[-1:]]
    pairs = (  # percentages, times 10 for the view box of 1000 by 1000, where y points down
        f"{10 * x_axis.at(x):.1f},{1000 - 10 * y_axis.at(y):.1f}"
        for x, y in drawn_points
        if math.isfinite(y)
    )
    return _LINE.format(style=style, points=" ".join(pairs))


def layer_plot(name: str, title: str, scores: Mapping[int, float], kept: set[int]) -> Markup:
    """Draws a bar with the score of each layer, numbered from 1; hollow if not in ``kept``."""
    skewed = is_skewed(scores.values())
    bar_bottom = min(scores.values()) / 2 if skewed else 0.0
    y_axis = axis_over([bar_bottom, *scores.values()], logarithmic=skewed)
    # Removes the margin below the bars.
    y_axis = replace(y_axis, low=math.log10(bar_bottom) if skewed else 0.0)
    last_layer = max(scores)
    slot = 100 / last_layer  # width of a bar and its free space, in percent of the plot
    # Layer 1 and multiples of ``label_step`` have a label. There are at most 12 such multiples.
    label_step = next(n for n in (1, 2, 5, 10, 20, last_layer) if last_layer / n <= 12)
    elements = [y_grid(y_axis)]
    for layer, score in sorted(scores.items()):
        style = "kept" if layer in kept else "dropped"
        height = max(0.0, y_axis.at(score))
        elements.append(
            _BAR.format(
                style=style,
                x=round((layer - 0.85) * slot, 3),
                y=round(100 - height, 3),
                width=round(0.7 * slot, 3),  # 15% of the slot stays free on each side
                height=height,
                hint=f"layer {layer}, {style}: {score:.6g}",
            )
        )
        if layer % label_step == 0 or layer == 1:
            elements.append(_x_tick(round((layer - 0.5) * slot, 3), layer))
    return frame(name, title, 200, *elements)


def interval_plot(
    name: str,
    title: str,
    rows: Mapping[str, Sequence[tuple[str, float, float | None]]],
    text_of: Callable[[float], str] = "{:.4g}".format,
) -> Markup:
    """Draws a row per metric or model, each with one or more values and their 95% intervals.

    ``rows`` maps a row's label to tuples of a model's CSS class, the model's value, and half the
    width of the value's interval, ``None`` without an interval. ``text_of`` formats a value.
    """
    rows = {
        label: [
            (style, value, margin if margin is not None and _can_be_drawn(margin) else None)
            for style, value, margin in row
            if _can_be_drawn(value)
        ]
        for label, row in rows.items()
    }
    margins = ((v, margin or 0) for row in rows.values() for _, v, margin in row)
    x_axis = axis_over((end for v, m in margins for end in (v - m, v, v + m)), pad=0.04)
    elements = [x_grid(x_axis, 5, text_of)]
    row_height = 100 / len(rows)
    for index, (label, row) in enumerate(rows.items()):
        middle = (index + 0.5) * row_height
        short_label = label if len(label) <= MAX_ROW_LABEL else f"{label[:7]}…{label[-7:]}"
        elements.append(_ROW.format(label=short_label, name=label, y=round(middle, 2)))
        for position, (style, value, margin) in enumerate(row):
            hint = f"{label}, {style}: {text_of(value)}"
            # Intervals are a quarter of the row apart, centred on its middle.
            offset = (position - (len(row) - 1) / 2) * row_height / 4
            elements.append(
                _INTERVAL.format(
                    style=style,
                    at=x_axis.at(value),
                    low=x_axis.at(value - (margin or 0)),
                    high=x_axis.at(value + (margin or 0)),
                    y=round(middle + offset, 2),
                    hint=hint if margin is None else f"{hint} ± {text_of(margin)}",
                )
            )
    return frame(name, title, ROW_PIXELS * len(rows), *elements)


@dataclass(frozen=True)
class Mark:
    """A model in a plot of quality against cost; ``style`` is its CSS class."""

    label: str
    style: str
    cost: float
    quality: float
    interval: tuple[float, float] | None = None
    """95% interval of the quality."""
    reference: bool = False
    """Whether the model, such as the teacher, is left out of the Pareto front."""


def trade_off_plot(name: str, marks: Sequence[Mark], cost: Dimension, quality: Dimension) -> Markup:
    """Draws quality against cost. A stepped line joins the marks on the Pareto front."""
    title = f"{quality.title} against {cost.title}"
    marks = [
        mark if _can_be_drawn(*(mark.interval or ())) else replace(mark, interval=None)
        for mark in marks
        if _can_be_drawn(mark.cost, mark.quality)
    ]
    if not marks:
        return frame(name, title, 230)
    sign = -1 if quality.higher_is_better else 1  # ``pareto_front`` minimises
    candidates = [i for i, mark in enumerate(marks) if not mark.reference]
    on_front = pareto_front([(marks[i].cost, sign * marks[i].quality) for i in candidates])
    front = {candidates[i] for i in on_front}  # indices of marks
    costs = [mark.cost for mark in marks]
    qualities = [v for mark in marks for v in (mark.quality, *(mark.interval or ()))]
    x_axis, y_axis = (
        axis_over(values, pad=0.12, logarithmic=is_skewed(values)) for values in (costs, qualities)
    )
    points = [(x_axis.at(mark.cost), round(100 - y_axis.at(mark.quality), 3)) for mark in marks]
    elements = [y_grid(y_axis, quality.text_of), x_grid(x_axis, 3, cost.text_of)]
    # A step goes horizontally to the next mark's cost, and then vertically to its quality.
    for (x1, y1), (x2, y2) in pairwise(sorted(points[i] for i in front)):
        elements.append(_FRONT.format(x1=x1, x2=x2, y1=y1, y2=y1))
        elements.append(_FRONT.format(x1=x2, x2=x2, y1=y1, y2=y2))
    for i, (mark, label) in enumerate(zip(marks, _labels(marks, points), strict=True)):
        hint = f"{mark.label or mark.style}: {quality.title} {quality.text_of(mark.quality)}, "
        hint += f"{cost.title} {cost.text_of(mark.cost)}"
        elements.append(_mark(mark, points[i], y_axis, i in front, label, hint))
    return frame(name, title, 230, *elements)


def _can_be_drawn(*values: float) -> bool:
    return all(abs(value) < MAX_VALUE for value in values)  # false if a value is NaN


def _mark(mark: Mark, point: Point, y_axis: Axis, on_front: bool, label: str, hint: str) -> Markup:
    x, y = point
    low, high = mark.interval or (mark.quality, mark.quality)
    status = "reference" if mark.reference else "best" if on_front else "beaten"
    dx, anchor = (4, "start") if x < 75 else (-4, "end")  # near the right end: label on the left
    return _MODEL_MARK.format(
        style=f"{mark.style} {status}",
        x=x,
        y=y,
        low=round(100 - y_axis.at(low), 3),
        high=round(100 - y_axis.at(high), 3),
        radius=6 if on_front else 4.5,
        label=label,
        dx=dx,
        anchor=anchor,
        hint=hint + (", on the Pareto front" if on_front else ""),
    )


def _labels(marks: Sequence[Mark], points: Sequence[Point]) -> list[str]:
    """Returns the label of each mark. Of several close marks, the first gets all their labels."""
    texts: dict[int, list[str]] = {}  # by the index of the mark that shows them
    for i, point in enumerate(points):
        if marks[i].label:
            first_close = next((j for j in texts if _are_close(points[j], point)), i)
            texts.setdefault(first_close, []).append(marks[i].label)
    return [", ".join(texts.get(i, [])) for i in range(len(points))]


def _are_close(a: Point, b: Point) -> bool:
    return abs(a[0] - b[0]) < LABEL_DISTANCE and abs(a[1] - b[1]) < LABEL_DISTANCE
