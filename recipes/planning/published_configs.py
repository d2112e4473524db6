"""Shapes of models that the shipped recipes start from, for planning where no hub is in reach.

Only what a plan needs of each public ``config.json``; weights, tokenizer and everything else still
come from the hub. Checked against the published numbers of parameters in the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_convert.hub import hub_model, in_reach, is_hub_id, read_hf_config
from recipes.core.files import read_json

CONFIGS: dict[str, dict[str, Any]] = read_json(Path(__file__).with_suffix(".json"))
"""By hub id."""


def read_config_or_published(hf_path: str) -> tuple[dict[str, Any], bool]:
    """``read_hf_config``, or for a model of a shipped recipe its bundled copy without a hub.

    Returns the config, and whether it is the bundled copy.
    """
    published = CONFIGS.get(str(hub_model(hf_path)["repo_id"])) if is_hub_id(hf_path) else None
    if published is not None and not in_reach(hf_path):
        return published, True
    return read_hf_config(hf_path), False
