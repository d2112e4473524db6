"""Writes the report of a run as one self-contained HTML file.

Reads the manifests and metrics of its inputs and of the stages before them. Writes ``report.html``.
"""

from __future__ import annotations

from pathlib import Path

from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.report.settings import REPORT_FILE, TEMPLATES, ReportConfig
from recipes.stages.contract import Stage


def run(cfg: ReportConfig, inputs: Inputs, out: Path) -> Outcome:
    """Renders the page."""
    from recipes.report.page import render

    render(cfg, inputs, out / REPORT_FILE)
    metrics_log(out).progress("report", 1, 1)
    return Outcome()


STAGE = Stage(
    config=ReportConfig,
    kind="report",
    run=run,
    one_rank="it writes one page",
    inputs={
        "teacher": ("checkpoint_nemo",),
        "data": ("dataset",),
        "pruned": ("checkpoint_nemo",),
        "distilled": ("checkpoint_nemo",),
        "evaluation": ("eval_results",),
        "exported": ("checkpoint_hf",),
    },
    # Each adds a section to the page.
    optional_inputs={
        "tasks": ("task_results",),
        "speed": ("speed_results",),
        "engine": ("engine",),
        "gguf": ("gguf",),
        "plan": ("plan",),
        "search": ("search_results",),
    },
    needs_torch=False,
    needs_gpu=lambda config, chain: False,
    external=lambda config: {"templates": TEMPLATES},
)

if __name__ == "__main__":
    STAGE.main()
