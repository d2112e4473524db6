"""Settings of ``report``. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from recipes.core.stage import StageConfig

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).with_name("templates")
"""Fingerprints of code do not cover templates, so stages declare these as external files."""
CARD_TEMPLATE = TEMPLATES / "model_card.md.j2"


@dataclass
class ReportConfig(StageConfig):
    """Settings of ``report``."""

    title: str = ""
    """Name of the recipe."""
    description: str = ""
    """Purpose of the recipe, in one line."""
    gates: list[str] = field(default_factory=list)
    """Gates, which the report shows with the measured values. The launcher checks the gates, so a
    changed threshold reruns only the report."""
