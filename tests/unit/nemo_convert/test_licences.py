"""Licences are read from model cards, and names that forbid commercial use are recognized."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_convert.licences import forbids_commercial_use, model_licence


@pytest.mark.parametrize(
    ("licence", "forbidden"),
    [
        ("CC-BY-NC-4.0", True),
        ("cc-by-nc-sa-4.0", True),
        ("written by a model; its licence applies: cc-by-nc-4.0", True),
        ("mnpl, non-commercial", True),
        ("Research only", True),
        ("qwen-research", True),
        ("mrl", True),  # Mistral AI Research License
        ("Mistral AI Research License", True),
        ("cc_by_nc_4.0", True),
        ("cc-by-nc4.0", True),
        ("qwen_research_license", True),
        ("qwen-research, mit", True),
        ("not for commercial use", True),
        ("No commercial use", True),
        ("commercial use is prohibited", True),
        ("for research use only", True),
        ("only for academic purposes", True),
        ("microsoft-research MIT", False),
        ("Academic Free License v3.0", False),
        ("no commercial restrictions", False),
        ("open for research and commercial use", False),
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


@pytest.mark.parametrize(
    ("header", "licence"),
    [
        ("license: mit", "mit"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license: other\nlicense_name: qwen-research", "qwen-research"),
        ("license: other", "other"),
        ("license_name: mrl", "mrl"),
        ("tags: [a]", "unknown"),
        ("- a list", "unknown"),
    ],
)
def test_licence_is_read_from_the_header_of_a_model_card(
    header: str, licence: str, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# A model\n")
    assert model_licence(tmp_path) == licence


@pytest.mark.parametrize("start", ["\n", "\ufeff", "---\ntags:\n- a\n---more: 1\n"])
def test_headers_are_found_as_the_hub_finds_them(start: str, tmp_path: Path) -> None:
    """After a blank line, after a byte order mark, and with a line that only starts with "---"."""
    header = "license: mit\n---\n# A model\n"
    text = start + (header if start.startswith("---") else f"---\n{header}")
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert model_licence(tmp_path) == "mit"
