"""Writes the report of a run as one self-contained HTML file.

Reads the manifests and metrics of the inputs, and of all stages that the inputs depend on. Writes
``report.html`` about a distillation, a search, or both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.rules import Problem
from recipes.report.settings import REPORT_FILE, TEMPLATES, ReportConfig
from recipes.stages.contract import Stage

DISTILLATION = ("data", "pruned", "distilled", "evaluation", "exported")
"""Inputs that a report about a distillation requires, in addition to the teacher."""


def check(cfg: ReportConfig, chain: Chain) -> Iterator[Problem]:
    """Yields a problem if inputs of a distillation are missing."""
    missing_inputs = [name for name in DISTILLATION if name not in cfg.inputs]
    is_search_only = "search" in cfg.inputs and len(missing_inputs) == len(DISTILLATION)
    if missing_inputs and not is_search_only:
        yield Problem(
            rules.REPORT,
            f"a report about a distillation needs the inputs {', '.join(missing_inputs)}",
            f"set stages.{cfg.name}.inputs.{missing_inputs[0]} to a stage",
        )


def run(cfg: ReportConfig, inputs: Inputs, out: Path) -> Outcome:
    """Renders ``report.html``."""
    from recipes.report.page import render

    render(cfg, inputs, out / REPORT_FILE)
    metrics_log(out).progress("report", 1, 1)
    return Outcome()


STAGE = Stage(
    config=ReportConfig,
    kind="report",
    run=run,
    check=check,
    single_rank_reason="the stage writes one page",
    inputs={"teacher": ("checkpoint_nemo",)},
    optional_inputs={
        "search": ("search_results",),
        "data": ("dataset",),
        "pruned": ("checkpoint_nemo",),
        "distilled": ("checkpoint_nemo",),
        "evaluation": ("eval_results",),
        "exported": ("checkpoint_hf",),
        "tasks": ("task_results",),
        "served": ("served_results",),
        "speed": ("speed_results",),
        "engine": ("engine",),
        "gguf": ("gguf",),
        "sizes": ("checkpoint_nemo",),  # the student with added layers
        "plan": ("plan",),
    },
    needs_torch=False,
    needs_gpu=lambda config, chain: False,
    external=lambda config: {"templates": TEMPLATES},
    names_accepted_results=True,
)
