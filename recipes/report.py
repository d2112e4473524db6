"""One self-contained HTML file that says what was asked, done and measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from recipes.manifest import Outcome
from recipes.preflight import Chain, Problem, one_rank_problems
from recipes.stage import Inputs, StageConfig, metrics_log, stage_main

KIND = "report"
LIGHT = True
INPUTS = {
    "teacher": "checkpoint_nemo",
    "data": "dataset",
    "pruned": "checkpoint_nemo",
    "distilled": "checkpoint_nemo",
    "evaluation": "eval_results",
    "exported": "checkpoint_hf",
}
OPTIONAL_INPUTS = {
    "tasks": "task_results",
    "benchmark": "benchmark_results",
    "engine": "engine",
    "plan": "plan",
    "search": "search_results",
}
"""Each adds its section to the page."""
FILE = "report.html"


@dataclass
class Config(StageConfig):
    """Settings of ``report``."""

    title: str = ""
    """Name of the recipe."""
    description: str = ""
    """What the recipe does, in a line."""
    gates: list[str] = field(default_factory=list, metadata={"resource": True})
    """Shown with what was measured. The launcher judges them, so that another threshold runs
    nothing again, not even this."""


def external(cfg: Config) -> dict[str, Path]:
    """The pages' templates, which the code's fingerprint does not see."""
    return {"templates": Path(__file__).with_name("report_templates")}


def check(cfg: Config, chain: Chain) -> Iterator[Problem]:
    """A report has no settings that could fail."""
    yield from one_rank_problems(cfg, "there is one page to write")


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Collects the inputs' manifests and metrics, and renders them."""
    from recipes.report_page import render

    log = metrics_log(out)
    render(cfg, inputs, out / FILE)
    log.progress("report", 1, 1)
    return Outcome(metrics={"file": FILE})


if __name__ == "__main__":
    stage_main(run, Config, KIND)
