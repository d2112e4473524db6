"""How many tokens a distillation still needs, by a power law with an offset, fitted to its loss.

The loss after ``t`` tokens is taken to be ``floor + drop * (1 + t / scale) ** -power``, as in the
scaling laws of trainings (Hoffmann et al., arXiv:2203.15556), counted from what pruning left. All
four are fitted by least squares; intervals are of residuals drawn again (Efron's bootstrap). They
hold the noise of the curve and not what a curve cannot know of: a learning rate that is still to
fall, or text that repeats. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

from recipes.core.metrics import METRICS, Record, read_records, steps_of
from recipes.core.statistics import mean, standard_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Draws: TypeAlias = NDArray[np.float64]

SHARES = (0.9, 0.95, 0.99)
"""Of what pruning lost, which are forecast."""
TERM = "kd"
"""The curve that is forecast: the divergence from the teacher, whose own is 0."""
FEWEST = 20
"""Steps below which nothing is said."""
MOST = 500
"""Points that a longer curve is averaged to."""
DRAWS = 200
Curve = Sequence[tuple[float, float]]
"""Losses by tokens."""
FAR = 10.0
"""Times the tokens that were seen, beyond which nothing is said."""
INTERVAL = (2.5, 97.5)
"""Percentiles of the draws."""
SIGNIFICANT = 3.0
"""Standard errors by which a curve must have fallen."""
LEFT = "left"
"""Of a training's records: the share of what pruning lost that healing had left to it."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval; infinite where a curve never gets there."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """Curves that a loss may follow, [draws] each; the first is the best, others are drawn."""

    floor: Draws
    drop: Draws
    scale: Draws
    power: Draws
    left: float = 1.0
    """Share of what pruning lost that there was at the start of the curve."""

    def loss(self, tokens: float) -> Estimate:
        """After so many tokens."""
        return _estimate(self._losses(tokens))

    def recovered(self, tokens: float) -> Estimate:
        """The share of what pruning lost that is back after so many tokens, of a goal of 0."""
        return _estimate(1 - self.left * self._losses(tokens) / (self.floor + self.drop))

    def _losses(self, tokens: float) -> Draws:
        return self.floor + self.drop * (1 + tokens / self.scale) ** -self.power

    def tokens_to(self, share: float) -> Estimate:
        """Tokens after which this share is back."""
        import numpy as np

        goal = (1 - share) / self.left * (self.floor + self.drop) - self.floor
        with np.errstate(all="ignore"):
            tokens = self.scale * ((self.drop / goal) ** (1 / self.power) - 1)
        return _estimate(np.where(goal > 0, np.maximum(tokens, 0.0), np.inf))

    def limit(self) -> Estimate:
        """The share that is back after any number of tokens."""
        return _estimate(1 - self.left * self.floor / (self.floor + self.drop))


@dataclass(frozen=True)
class Recovery:
    """What it takes to bring back a share of what pruning lost; no tokens where it is not known."""

    share: float
    tokens: Estimate | None
    """From the first step on."""
    hours: Estimate | None
    """From the last step that was seen on, as are dollars."""
    dollars: Estimate | None
    why: str = ""
    """Why it is not known."""


@dataclass(frozen=True)
class Forecast:
    """Of one training; ``why`` says why there is none."""

    why: str = ""
    tokens: int = 0
    """That were seen."""
    recovered: Estimate | None = None
    """The share that is back by now, by the curve."""
    limit: Estimate | None = None
    """The share that it comes to in the end."""
    rows: tuple[Recovery, ...] = ()


def fit(curve: Curve, left: float = 1.0) -> Fit:
    """The curve of least squares above 0, and those of losses with residuals drawn again."""
    import numpy as np

    t, y = np.asarray(curve, float).T
    grid = np.meshgrid(np.geomspace(t[-1] / 300, 30 * t[-1], 40), np.geomspace(0.05, 5, 40))
    scale, power = (axis.ravel() for axis in grid)
    basis = (1 + t / scale[:, None]) ** -power[:, None]
    best = _least_squares(basis, y[:, None])
    place, floor, drop = (found[0] for found in best)
    fitted = floor + drop * basis[place]
    residuals = (y - fitted) * (len(y) / max(1, len(y) - 4)) ** 0.5
    drawn = np.random.default_rng(0).choice(residuals, (len(y), DRAWS))
    again = _least_squares(basis, fitted[:, None] + drawn)
    places, floors, drops = (np.append(a, b) for a, b in zip(best, again, strict=True))
    return Fit(floors, drops, scale[places], power[places], left)


def _least_squares(basis: Draws, y: Draws) -> tuple[NDArray[np.intp], Draws, Draws]:
    """The best row of a basis [rows, points] for each of y [points, draws], its floor and drop."""
    import numpy as np

    mean, square = basis.mean(1)[:, None], (basis**2).mean(1)[:, None]
    level, product = y.mean(0), basis @ y / len(y)
    drop = (product - mean * level) / np.maximum(square - mean**2, 1e-12)
    floor = level - drop * mean
    below = floor < 0
    drop, floor = np.where(below, product / square, drop), np.where(below, 0.0, floor)
    errors = drop**2 * square + 2 * drop * floor * mean + floor**2
    errors -= 2 * (drop * product + floor * level)
    places = np.where(drop > 0, errors, np.inf).argmin(0)
    draws = np.arange(y.shape[1])
    return places, floor[places, draws], drop[places, draws]


def forecast(
    steps: Sequence[Record], step_tokens: int, hourly: float | None = None, left: float = 1.0
) -> Forecast:
    """What the records of a training's steps say of its end.

    Args:
        steps: In order, as they were logged.
        step_tokens: Tokens of a step.
        hourly: Dollars of an hour of all devices, where they are known.
        left: Share of what pruning lost that there was before the first step.
    """
    curve = _points(steps, step_tokens)
    if why := _silence(curve):
        return Forecast(why)
    found, seen = fit(averaged(curve), left), curve[-1][0]
    rate = median(s["tokens_per_second"] for s in steps)
    rows = tuple(_row(found, share, seen, rate, hourly) for share in SHARES)
    return Forecast("", int(seen), found.recovered(seen), found.limit(), rows)


def share_after(
    steps: Sequence[Record], step_tokens: int, tokens: int, left: float = 1.0
) -> Estimate | None:
    """The share that will be back after so many tokens; ``None`` where the curve does not say."""
    curve = _points(steps, step_tokens)
    return None if _silence(curve) else fit(averaged(curve), left).recovered(tokens)


def _points(steps: Sequence[Record], step_tokens: int) -> Curve:
    return [(s["done"] * step_tokens, s[TERM]) for s in steps if s.get(TERM) is not None]


def _silence(curve: Curve) -> str:
    """Why nothing can be said; empty where something can."""
    if len(curve) < FEWEST:
        what = "steps with a loss on the teacher's logits"
        return f"{len(curve)} {what} are too few to say, of {FEWEST} at least"
    falls = _falls([loss for _, loss in curve])
    return "" if falls else "the loss does not fall by more than its noise"


def curve_of(stage_dir: Path, config: Mapping[str, Any]) -> tuple[list[Record], int]:
    """A training's steps as it has logged them so far, and the tokens of one, for ``forecast``."""
    step_tokens = config.get("global_batch_size", 0) * config.get("seq_length", 0)
    return steps_of(stage_dir / METRICS, "distill"), step_tokens


def left_of(file: Path) -> float:
    """What a training has logged as ``LEFT``; all, where its student was not healed."""
    return next((float(record[LEFT]) for record in read_records(file) if LEFT in record), 1.0)


def averaged(curve: Curve) -> Curve:
    """A long curve as means of neighbours."""
    size = -(-len(curve) // MOST)
    parts = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(mean([t for t, _ in part]), mean([y for _, y in part])) for part in parts]


def _falls(losses: Sequence[float]) -> bool:
    """Whether the second half is below the first by more than chance."""
    half = len(losses) // 2
    first, second = losses[:half], losses[half:]
    noise = (standard_error(first) ** 2 + standard_error(second) ** 2) ** 0.5
    return bool(mean(first) - mean(second) > SIGNIFICANT * noise)


def in_words(found: Forecast) -> str:
    """One line."""
    if found.recovered is None or found.limit is None:
        return f"no forecast: {found.why}"
    parts = [
        f"{found.recovered.value:.0%} of the divergence from the teacher is back, "
        f"{found.limit.value:.0%} ({found.limit.low:.0%} to {found.limit.high:.0%}) at most by its "
        "curve, which does not know what a falling learning rate brings"
    ]
    for said, rows in groupby(found.rows, _row_in_words):
        parts.append(f"{', '.join(f'{row.share:.0%}' for row in rows)}{said}")
    return "; ".join(parts)


def _row_in_words(row: Recovery) -> str:
    if row.tokens is None or row.hours is None:
        return f": {row.why}"
    low, value, high = map(_rounded, (row.tokens.low, row.tokens.value, row.tokens.high))
    cost = f" and ${row.dollars.value:,.2f}" if row.dollars else ""
    hours = _rounded(row.hours.value)
    return f" at {value} tokens ({low} to {high}), {hours} h{cost} from here"


def _rounded(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.15g}"  # to two digits, without an exponent


def _row(found: Fit, share: float, seen: float, rate: float, hourly: float | None) -> Recovery:
    tokens = found.tokens_to(share)
    if found.limit().high < share:
        return Recovery(share, None, None, None, "more than this curve comes to")
    if not tokens.value <= FAR * seen or not tokens.high < float("inf"):
        least = (
            f"at least {_rounded(tokens.low)} tokens" if tokens.low < FAR * seen else "far beyond"
        )
        return Recovery(share, None, None, None, f"{least}; the curve does not say more yet")
    more = Estimate(*(max(0.0, end - seen) for end in (tokens.value, tokens.low, tokens.high)))
    hours = _times(more, 1 / rate / 3600)
    return Recovery(share, tokens, hours, _times(hours, hourly) if hourly else None)


def _times(value: Estimate, factor: float) -> Estimate:
    return Estimate(value.value * factor, value.low * factor, value.high * factor)


def _estimate(draws: Draws) -> Estimate:
    """The first of the draws, between percentiles of all."""
    import numpy as np

    low, high = (float(np.percentile(draws, end, method="nearest")) for end in INTERVAL)
    return Estimate(float(draws[0]), low, high)
