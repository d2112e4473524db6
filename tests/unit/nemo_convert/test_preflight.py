"""``check_model`` finds faults and notes from headers and small files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_convert.preflight import check_model
from tests.unit.conftest import LLAMA_CONFIG


@pytest.mark.parametrize(
    ("settings", "notes"),
    [
        ({"torch_dtype": "bfloat16"}, 0),
        ({"torch_dtype": "float32"}, 1),
        ({"torch_dtype": "auto"}, 1),
        ({}, 1),
    ],
)
def test_a_note_names_the_data_type(hf_folder: Path, settings: dict[str, Any], notes: int) -> None:
    """transformers uses float32 if a config has no type; the weights are bfloat16."""
    config = {key: value for key, value in LLAMA_CONFIG.items() if key != "torch_dtype"}
    (hf_folder / "config.json").write_text(json.dumps(config | settings))
    findings = [*check_model(str(hf_folder))]
    assert len(findings) == notes
    for finding in findings:
        assert not finding.is_error
        assert "bfloat16" in finding.fix
