"""Forecasts of distillations from a part of their curves, against how they ended.

``python -m benchmarks.forecasts RUN/distill …`` reads what these stages logged, and what NVIDIA
published. The end is the mean of the last tenth of the steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.core.metrics import METRICS, steps_of
from recipes.core.stage import REQUEST
from recipes.core.statistics import mean
from recipes.distillation.forecast import TERM, Curve, Estimate, averaged, fit, forecast

PARTS = (0.1, 0.2, 0.5)
"""Of the tokens, that a forecast sees."""
PRUNED = 0.0
PUBLISHED = {
    "Nemotron-Nano-9B-v2 to 7B": (
        {PRUNED: 18.4, 2.5: 60.0, 20: 63.6, 40: 64.1, 60: 64.4, 80: 65.1},
        65.9,
    ),
    "Nemotron-3-Nano 31.6B to 22B": (
        {PRUNED: 32.3, 2.5: 60.4, 20: 63.6, 40: 64.2, 60: 64.7, 80: 65.3},
        68.2,
    ),
}
"""Means of 8 and 7 benchmarks, in percent, after so many billion tokens; and the teacher's.

From the tables of github.com/NVIDIA/Model-Optimizer, examples/pruning/minitron/NVIDIA-Nemotron-*.
"""


@dataclass(frozen=True)
class Row:
    """A forecast from the first tokens of a curve, and what it came to."""

    name: str
    seen: float
    end: float
    forecast: Estimate
    measured: float
    why: str = ""
    """Why it would not be said."""

    def __str__(self) -> str:
        found = self.forecast
        inside = "inside" if found.low <= self.measured <= found.high else "outside"
        return (
            f"| {self.name} | {self.seen:,.4g} of {self.end:,.4g} | {found.value:.3f} "
            f"({found.low:.3f} to {found.high:.3f}) | {self.measured:.3f} "
            f"| {found.value - self.measured:+.3f}, {found.value / self.measured - 1:+.0%}, "
            f"{inside} | {self.why or 'said'} |"
        )


def of_training(stage: Path, step_tokens: int) -> Iterator[Row]:
    """Of a distillation's divergence from the teacher."""
    steps = [s for s in steps_of(stage / METRICS, "distill") if s.get(TERM) is not None]
    curve = [(s["done"] * step_tokens, s[TERM]) for s in steps]
    tail = curve[-max(1, len(curve) // 10) :]
    tokens, measured = mean([t for t, _ in tail]), mean([y for _, y in tail])
    for part in PARTS:
        seen: Curve = curve[: round(part * len(curve))]
        if len(seen) > 3:
            found = fit(averaged(seen)).loss(tokens)
            why = forecast(steps[: len(seen)], step_tokens).why
            yield Row(str(stage), seen[-1][0], curve[-1][0], found, measured, why)


def of_published(name: str) -> Iterator[Row]:
    """Of a mean of benchmarks: how far it is from the teacher's, in points."""
    scores, teacher = PUBLISHED[name]
    curve = [(tokens, teacher - score) for tokens, score in scores.items()]
    for count in (3, 4, 5):
        found = fit(curve[:count]).loss(curve[-1][0])
        yield Row(name, curve[count - 1][0], curve[-1][0], found, curve[-1][1])


def main(words: Sequence[str] | None = None) -> None:
    """Prints the table."""
    from omegaconf import OmegaConf

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", type=Path, nargs="*", help="directories of stages that distilled")
    args = parser.parse_args(words)
    print("| curve | tokens seen | forecast at the end | measured | error | |")
    print("|---|---|---|---|---|---|")
    for stage in args.stages:
        config = OmegaConf.load(stage / REQUEST).config
        for row in of_training(stage, config.global_batch_size * config.seq_length):
            print(row)
    for name in PUBLISHED:
        for row in of_published(name):
            print(row)


if __name__ == "__main__":
    main()
