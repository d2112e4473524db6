"""Licences that forbid commercial use are recognised by their names."""

from __future__ import annotations

import pytest

from nemo_convert.licences import forbids_commercial_use


@pytest.mark.parametrize(
    ("licence", "forbidden"),
    [
        ("CC-BY-NC-4.0", True),
        ("cc-by-nc-sa-4.0", True),
        ("written by a model; its licence applies: cc-by-nc-4.0", True),
        ("mnpl, non-commercial", True),
        ("Research only", True),
        ("CC-BY-4.0", False),
        ("ODC-By-1.0", False),
        ("llama3.1", False),
        ("not recorded", False),
        ("public domain; use in commerce", False),
        (None, False),
    ],
)
def test_forbids_commercial_use(licence: str | None, forbidden: bool) -> None:
    assert forbids_commercial_use(licence) == forbidden
