"""Plots of trade-offs and of intervals, in the manner of ``plots``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from recipes.core.statistics import pareto_front
from recipes.report.plots import FRAME, TICK_Y, Axis, axis_over, columns, is_skewed, number, percent

Z95 = 1.96
"""Standard errors on each side of a value in a 95% interval of a normal distribution."""
NEAR = 4
"""Labels of marks that are closer than this share of a plot, in percent, would overlap."""
ROW = 46
"""Height of a row of intervals in pixels, enough for three of them."""

_MARK = Markup(
    '<line class="whisker {style}" x1="{x}%" x2="{x}%" y1="{high}%" y2="{low}%"/>'
    '<circle class="dot {style}" cx="{x}%" cy="{y}%" r="{radius}"><title>{hint}</title></circle>'
    '<text class="mark" x="{x}%" y="{y}%" dx="{dx}" dy="-9" text-anchor="{anchor}">{label}</text>'
)
_FRONT = Markup('<line class="front" x1="{x1}%" x2="{x2}%" y1="{y1}%" y2="{y2}%"/>')
_STRIPE = Markup('<line class="grid" x1="0" x2="100%" y1="{y}%" y2="{y}%"/>')
_NAME = Markup('<text class="row" x="0" y="{y}%" dx="-12" dy=".35em" text-anchor="end">{}</text>')
_SPAN = Markup(
    '<line class="whisker {style}" x1="{low}%" x2="{high}%" y1="{y}%" y2="{y}%"/>'
    '<circle class="dot {style}" cx="{at}%" cy="{y}%" r="4.5"><title>{hint}</title></circle>'
)
_SPEED = Markup(
    '<svg class="share speed" role="img" aria-label="{hint}"><title>{hint}</title>'
    '<rect class="track" width="100%" height="100%"/>'
    '<rect class="fill {style}" width="{width}%" height="100%"/>'
    '<line class="one" x1="{one}%" x2="{one}%" y1="0" y2="100%"/>{bound}</svg>'
)
_BOUND = Markup('<line class="bound" x1="{at}%" x2="{at}%" y1="0" y2="100%"/>')


@dataclass(frozen=True)
class Mark:
    """A model in a plot of quality against cost."""

    label: str
    style: str
    x: float
    y: float
    low: float | None = None
    """Lower end of the interval of ``y``; none where it is not known."""
    high: float | None = None
    reference: bool = False
    """Shown, but no candidate for the front, as a teacher is."""


@dataclass(frozen=True)
class Dimension:
    """What an axis shows and how its figures are written."""

    title: str
    write: Callable[[float], str] = number
    higher_is_better: bool = False


def front_of(marks: Sequence[Mark], up: Dimension) -> set[int]:
    """Indices of the marks on the front; less cost is better, quality as the axis says."""
    sign = -1 if up.higher_is_better else 1
    chosen = [i for i, mark in enumerate(marks) if not mark.reference]
    found = pareto_front([(marks[i].x, sign * marks[i].y) for i in chosen])
    return {chosen[i] for i in found}


def trade_off_plot(name: str, marks: Sequence[Mark], across: Dimension, up: Dimension) -> Markup:
    """Quality against cost, with intervals; a stepped line joins the marks on the Pareto front."""
    front = front_of(marks, up)
    heights = [v for m in marks for v in (m.low, m.y, m.high) if v is not None]
    x, y = (
        axis_over(values, pad=0.12, logarithmic=is_skewed(values))
        for values in ([m.x for m in marks], heights)
    )
    body = Markup("").join(
        [
            *(TICK_Y.format(at=100 - y.at(v), label=up.write(v)) for v in y.ticks()),
            columns(x, 3, across.write),
            _front([(x.at(marks[i].x), 100 - y.at(marks[i].y)) for i in front]),
            *(
                _mark(mark, label, i in front, (x, y), (across, up))
                for i, (mark, label) in enumerate(zip(marks, _labels(marks, x, y), strict=True))
            ),
        ]
    )
    title = f"{up.title} against {across.title}"
    return FRAME.format(name=name, title=title, height=230, body=body)


def _front(points: list[tuple[float, float]]) -> Markup:
    """The border of what is reached: no better quality than the last mark's up to the next cost."""
    ordered = sorted(points)
    lines = []
    for (x1, y1), (x2, y2) in pairwise(ordered):
        lines.append(_FRONT.format(x1=x1, x2=x2, y1=y1, y2=y1))
        lines.append(_FRONT.format(x1=x2, x2=x2, y1=y1, y2=y2))
    return Markup("").join(lines)


def _mark(
    mark: Mark,
    label: str,
    on_front: bool,
    axes: tuple[Axis, Axis],
    dimensions: tuple[Dimension, Dimension],
) -> Markup:
    (x, y), (across, up) = axes, dimensions
    at = x.at(mark.x)
    fate = "reference" if mark.reference else "best" if on_front else "beaten"
    hint = f"{mark.label or mark.style}: {up.title} {up.write(mark.y)}, "
    hint += f"{across.title} {across.write(mark.x)}"
    return _MARK.format(
        style=f"{mark.style} {fate}",
        x=at,
        y=round(100 - y.at(mark.y), 3),
        low=round(100 - y.at(mark.y if mark.low is None else mark.low), 3),
        high=round(100 - y.at(mark.y if mark.high is None else mark.high), 3),
        radius=6 if on_front else 4.5,
        label=label,
        dx=4 if at < 75 else -4,
        anchor="start" if at < 75 else "end",
        hint=hint + (", on the Pareto front" if on_front else ""),
    )


def _labels(marks: Sequence[Mark], x: Axis, y: Axis) -> list[str]:
    """What to write beside each mark; the first of several at one place speaks for all."""
    places = [(x.at(mark.x), y.at(mark.y)) for mark in marks]
    labels: list[str] = []
    for i, (across, up) in enumerate(places):
        near = [
            j for j, (a, b) in enumerate(places) if abs(a - across) < NEAR and abs(b - up) < NEAR
        ]
        words = [marks[j].label for j in near if marks[j].label]
        labels.append(", ".join(words) if near[0] == i else "")
    return labels


def interval_rows(
    name: str, title: str, rows: Mapping[str, Sequence[tuple[str, float, float]]]
) -> Markup:
    """One row per measure, one dot and 95% interval per model: (style, value, standard error)."""
    ends = (v + s * Z95 * e for row in rows.values() for _, v, e in row for s in (-1, 1))
    across = axis_over(ends, pad=0.04)
    body = columns(across, 5, "{:.0%}".format)
    step = 100 / len(rows)
    for index, (label, row) in enumerate(rows.items()):
        middle = (index + 0.5) * step
        body += _NAME.format(label, y=round(middle, 2))
        body += _STRIPE.format(y=round((index + 1) * step, 2)) if index < len(rows) - 1 else ""
        for place, (style, value, error) in enumerate(row):
            body += _SPAN.format(
                style=style,
                at=across.at(value),
                low=across.at(value - Z95 * error),
                high=across.at(value + Z95 * error),
                y=round(middle + (place - (len(row) - 1) / 2) * step / 4, 2),
                hint=f"{label}, {style}: {value:.1%} ± {Z95 * error:.1%}",
            )
    return FRAME.format(name=name, title=title, height=ROW * len(rows), body=body)


def speed_bar(value: float, bound: float | None, largest: float, style: str) -> Markup:
    """A bar of a speed-up from zero, with a line at 1 and one at what the hardware allows."""
    hint = f"{value:.2f} times as fast" + (f"; at most {bound:.2f} expected" if bound else "")
    return _SPEED.format(
        style=style,
        hint=hint,
        width=percent(value / largest),
        one=percent(1 / largest),
        bound=_BOUND.format(at=percent(bound / largest)) if bound else "",
    )
