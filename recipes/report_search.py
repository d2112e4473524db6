"""One self-contained HTML file that says which shapes a search compared, and which one it chose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recipes.manifest import Outcome
from recipes.preflight import Chain, Problem, one_rank_problems
from recipes.stage import Inputs, StageConfig, metrics_log, stage_main

KIND = "report"
LIGHT = True
INPUTS = {"teacher": "checkpoint_nemo", "search": "search_results"}
OPTIONAL_INPUTS = {"latency": "latency_model"}
FILE = "report.html"
TEMPLATE = "search_report.html.j2"


@dataclass
class Config(StageConfig):
    """Settings of ``report_search``."""

    title: str = ""
    """Name of the recipe."""
    description: str = ""
    """What the recipe does, in a line."""


def external(cfg: Config) -> dict[str, Path]:
    """The pages' templates, which the code's fingerprint does not see."""
    return {"templates": Path(__file__).with_name("report_templates")}


def check(cfg: Config, chain: Chain) -> Iterator[Problem]:
    """A report has no settings that could fail."""
    yield from one_rank_problems(cfg, "there is one page to write")


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Collects the inputs' manifests and renders them."""
    from recipes.report_format import render_template

    render_template(TEMPLATE, page(cfg, inputs), out / FILE)
    metrics_log(out).progress("report", 1, 1)
    return Outcome(metrics={"file": FILE})


def page(cfg: Config, inputs: Inputs) -> dict[str, Any]:
    """Everything that the template shows."""
    from recipes.report_cost import costs, upstream, versions
    from recipes.report_sections import search_section

    found = inputs["search"].manifest.metrics
    candidates = found["candidates"]
    chosen = next((one for one in candidates if one.get("chosen")), None)
    before = upstream(inputs)
    manifests = [*(item.manifest for item in inputs.values()), *before.values()]
    return {
        "title": cfg.title or "Search",
        "description": cfg.description,
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "teacher": inputs["teacher"].manifest,
        "search": search_section(found),
        "chosen": chosen,
        "latency": _latency(inputs),
        "versions": versions(manifests),
        **costs(inputs, before, []),
    }


def _latency(inputs: Inputs) -> Mapping[str, Any] | None:
    """Timed engines, each with how far the fitted line is from it."""
    if "latency" not in inputs:
        return None
    found = inputs["latency"].manifest.metrics
    shapes = [
        {**shape, "error": shape["fitted_ms"] / shape["step_ms"] - 1} for shape in found["shapes"]
    ]
    return {**found, "shapes": shapes}


if __name__ == "__main__":
    stage_main(run, Config, KIND)
