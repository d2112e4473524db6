"""Settings of ``report``. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from recipes.core.stage import StageConfig

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).with_name("templates")
"""Folder of the Jinja templates. Fingerprints of code do not cover templates, so stages declare
them as external files."""
CARD_TEMPLATE = TEMPLATES / "model_card.md.j2"


@dataclass
class ReportConfig(StageConfig):
    """Settings of ``report``."""

    title: str = ""
    """Name of the recipe."""
    description: str = ""
    """Purpose of the recipe, in one line."""
    gates: list[str] = field(default_factory=list)
    """Conditions such as ``recovered.sciq >= 0.95``, which the report shows with the measured
    values. The launcher checks them, so a changed threshold reruns only the report."""
