"""Plots of quality against cost, with the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from recipes.core.statistics import pareto_front
from recipes.report.plots import Axis, axis_over, frame, is_skewed, number, x_grid, y_grid

NEAR = 4
"""Points closer than this, in percent of the plot, share a label, since two would overlap."""

_MARK = Markup(
    '<line class="whisker {style}" x1="{x}%" x2="{x}%" y1="{high}%" y2="{low}%"/>'
    '<circle class="dot {style}" cx="{x}%" cy="{y}%" r="{radius}"><title>{hint}</title></circle>'
    '<text class="mark" x="{x}%" y="{y}%" dx="{dx}" dy="-9" text-anchor="{anchor}">{label}</text>'
)
_FRONT = Markup('<line class="front" x1="{x1}%" x2="{x2}%" y1="{y1}%" y2="{y2}%"/>')


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
    """Whether the model is shown without being a candidate for the front, such as the teacher."""


@dataclass(frozen=True)
class Dimension:
    """What an axis shows and how its values are written."""

    title: str
    write: Callable[[float], str] = number
    higher_is_better: bool = False


def front_of(marks: Sequence[Mark], up: Dimension) -> set[int]:
    """Returns the indices of marks on the Pareto front; references are left out."""
    sign = -1 if up.higher_is_better else 1
    candidates = [i for i, mark in enumerate(marks) if not mark.reference]
    front = pareto_front([(marks[i].cost, sign * marks[i].quality) for i in candidates])
    return {candidates[i] for i in front}


def trade_off_plot(name: str, marks: Sequence[Mark], across: Dimension, up: Dimension) -> Markup:
    """Draws quality against cost; a stepped line joins the marks on the Pareto front."""
    front = front_of(marks, up)
    costs = [mark.cost for mark in marks]
    heights = [v for mark in marks for v in (mark.quality, *(mark.interval or ()))]
    x, y = (axis_over(v, pad=0.12, logarithmic=is_skewed(v)) for v in (costs, heights))
    points = [(x.at(mark.cost), round(100 - y.at(mark.quality), 3)) for mark in marks]
    parts = [y_grid(y, up.write), x_grid(x, 3, across.write)]
    # From a mark, the front runs at the same quality to the next cost, and from there to its mark.
    for (x1, y1), (x2, y2) in pairwise(sorted(points[i] for i in front)):
        parts.append(_FRONT.format(x1=x1, x2=x2, y1=y1, y2=y1))
        parts.append(_FRONT.format(x1=x2, x2=x2, y1=y1, y2=y2))
    for i, (mark, label) in enumerate(zip(marks, _labels(marks, points), strict=True)):
        hint = f"{mark.label or mark.style}: {up.title} {up.write(mark.quality)}, "
        hint += f"{across.title} {across.write(mark.cost)}"
        parts.append(_mark(mark, points[i], y, i in front, label, hint))
    return frame(name, f"{up.title} against {across.title}", 230, *parts)


def _mark(
    mark: Mark, point: tuple[float, float], y: Axis, on_front: bool, label: str, hint: str
) -> Markup:
    low, high = mark.interval or (mark.quality, mark.quality)
    status = "reference" if mark.reference else "best" if on_front else "beaten"
    return _MARK.format(
        style=f"{mark.style} {status}",
        x=point[0],
        y=point[1],
        low=round(100 - y.at(low), 3),
        high=round(100 - y.at(high), 3),
        radius=6 if on_front else 4.5,
        label=label,
        dx=4 if point[0] < 75 else -4,
        anchor="start" if point[0] < 75 else "end",
        hint=hint + (", on the Pareto front" if on_front else ""),
    )


def _labels(marks: Sequence[Mark], points: Sequence[tuple[float, float]]) -> list[str]:
    """Returns the label of each mark; the first of several close ones has the labels of all."""
    labels = []
    for i, (x, y) in enumerate(points):
        near = [j for j, (a, b) in enumerate(points) if abs(a - x) < NEAR and abs(b - y) < NEAR]
        labels.append(
            ", ".join(filter(None, (marks[j].label for j in near))) if near[0] == i else ""
        )
    return labels
