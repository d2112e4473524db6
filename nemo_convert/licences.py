"""Reads licences of models, and detects licences that forbid commercial use. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from nemo_convert.hub import local_folder

NONCOMMERCIAL = re.compile(
    r"""
      (?<![a-z0-9])(nc|mrl|mnpl|amlr)(?![a-z])  # cc-by-nc-4.0
    | non-?(commercial|production)  # other-non-commercial
    | \bno(t-for|t-\w+-for)?-commercial-(use|purpose)  # not-licensed-for-commercial-use
    | commercial-use-(is-)?(not|forbidden|prohibited)  # commercial-use-is-not-allowed
    | \b(research|academic)(-use|-purposes?)?-(only|licen[cs]e)  # research-use-only
    | \bonly-for-(research|academic)  # only-for-research
    | -research(?![-\w])  # qwen-research
    """,
    re.VERBOSE,
)
"""Matches text in lower case, with hyphens between words. The abbreviations mrl and mnpl are
Mistral's Research and Non-Production licences. The abbreviation amlr is Apple's Machine Learning
Research licence."""


def card_fields(folder: Path) -> dict[str, Any]:
    """Returns the YAML header of a model card; empty if there is none or it is invalid.

    As in ``huggingface_hub`` (``repocard.py``), blank lines may precede the header.
    """
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
    header = re.match(r"\s*---\n(.*?)\n---(\n|$)", text, re.DOTALL)
    try:
        fields = yaml.safe_load(header.group(1)) if header else {}
    except yaml.YAMLError:
        return {}
    return fields if isinstance(fields, dict) else {}


def model_licence(folder: Path) -> str:
    """Returns the licence in a model card's header, or ``unknown``.

    If the hub's list does not have the licence, a card has ``license: other``, and the name is in
    ``license_name``.
    """
    fields = card_fields(folder)
    licence = fields.get("license")
    if licence in (None, "other"):
        licence = fields.get("license_name") or licence
    if isinstance(licence, list):
        return ", ".join(map(str, licence))
    return str(licence or "unknown")


def known_licence(hf_path: str) -> str:
    """Returns the licence of a model without a download; ``unknown`` if its card is not local."""
    folder = local_folder(hf_path)
    return model_licence(folder) if folder else "unknown"


def forbids_commercial_use(licence: str | None) -> bool:
    """Returns whether a licence's name forbids commercial use; ``False`` for ``None``."""
    hyphenated = re.sub(r"[-_\s]+", "-", (licence or "").lower())
    return bool(NONCOMMERCIAL.search(hyphenated))


def with_restriction(licence: str) -> str:
    """Returns a licence's name, with a remark if it forbids commercial use."""
    return f"{licence} (no commercial use)" if forbids_commercial_use(licence) else licence
