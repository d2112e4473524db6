"""``check_model`` finds faults and notes from headers and small files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_convert.preflight import check_model
from tests.unit.conftest import LLAMA_CONFIG


@pytest.mark.parametrize(
    ("dtype_setting", "num_notes"),
    [
        ({"torch_dtype": "bfloat16"}, 0),
        ({"torch_dtype": "float32"}, 1),
        ({"torch_dtype": "auto"}, 1),
        ({}, 1),
    ],
)
def test_a_note_names_the_weights_dtype_if_the_config_has_another_or_none(
    hf_folder: Path, dtype_setting: dict[str, Any], num_notes: int
) -> None:
    """The weights in ``hf_folder`` are bfloat16, so only a config with bfloat16 gets no note."""
    config = {key: value for key, value in LLAMA_CONFIG.items() if key != "torch_dtype"}
    (hf_folder / "config.json").write_text(json.dumps(config | dtype_setting))
    findings = list(check_model(str(hf_folder)))
    assert len(findings) == num_notes
    for finding in findings:
        assert not finding.is_error
        assert "bfloat16" in finding.fix
