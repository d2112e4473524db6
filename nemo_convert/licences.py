"""Licences of models and texts. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

NONCOMMERCIAL = re.compile(r"\bnc\b|non-?\s?commercial|research[- ]only", re.IGNORECASE)
"""Matches names such as CC-BY-NC-4.0, and phrases such as "non-commercial"."""


def model_licence(folder: Path) -> str:
    """Returns the licence in a model card's header, or ``unknown``."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        fields = yaml.safe_load(header.group(1)) if header else {}
    except yaml.YAMLError:
        return "unknown"
    names = fields.get("license") if isinstance(fields, dict) else None
    return ", ".join(map(str, names)) if isinstance(names, list) else str(names or "unknown")


def forbids_commercial_use(licence: str | None) -> bool:
    """Returns whether a licence's name says that it forbids commercial use."""
    return bool(licence and NONCOMMERCIAL.search(licence))


def with_restriction(licence: str) -> str:
    """Returns a licence, with a remark if it forbids commercial use."""
    return f"{licence} (no commercial use)" if forbids_commercial_use(licence) else licence
