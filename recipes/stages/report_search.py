"""Writes the report of an architecture search as one self-contained HTML file.

Reads the manifests of its inputs and of the stages before them. Writes ``report.html``, with the
compared shapes and the chosen one.
"""

from __future__ import annotations

from pathlib import Path

from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.report.settings import REPORT_FILE, TEMPLATES, SearchReportConfig
from recipes.stages.contract import Stage


def run(cfg: SearchReportConfig, inputs: Inputs, out: Path) -> Outcome:
    """Renders the page."""
    from recipes.report.page import render_search

    render_search(cfg, inputs, out / REPORT_FILE)
    metrics_log(out).progress("report", 1, 1)
    return Outcome()


STAGE = Stage(
    config=SearchReportConfig,
    kind="report",
    run=run,
    one_rank="it writes one page",
    inputs={"teacher": ("checkpoint_nemo",), "search": ("search_results",)},
    needs_torch=False,
    needs_gpu=lambda config, chain: False,
    external=lambda config: {"templates": TEMPLATES},
)

if __name__ == "__main__":
    STAGE.main()
