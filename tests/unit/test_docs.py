"""Tests the website, the generated page of settings, and the names of rules in documents."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.reference import PAGE, page
from recipes.core.files import REPO_ROOT
from recipes.planning.rules import RULES

DOCS = REPO_ROOT / "docs"


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="sphinx is not installed: make install")
    site = tmp_path / "site"
    command = ["-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(site)]
    done = subprocess.run(
        [sys.executable, *command], cwd=REPO_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = {page.stem for page in (site / "docs").glob("*.html")}
    assert pages == {page.stem for page in DOCS.glob("*.md")}
    index = (site / "docs" / "index.html").read_text(encoding="utf-8")
    # The index links to every page except itself.
    assert [name for name in pages if f'href="{name}.html"' not in index] == ["index"]


def test_the_page_of_settings_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), f"python -m launch.reference updates {PAGE}"


def test_rules_in_the_documents_are_real() -> None:
    """Documents write "rule" before a name in brackets or backticks; trouble.md only brackets."""
    trouble = (DOCS / "trouble.md").read_text(encoding="utf-8")
    rules = set(re.findall(r"\[([a-z0-9-]+)\](?!\()", trouble))  # but not links, [TEXT](TARGET)
    for file in DOCS.glob("*.md"):
        text = file.read_text(encoding="utf-8")
        rules |= set(re.findall(r"\brule (?:\[|`)([a-z0-9-]+)(?:\]|`)", text))
    assert len(rules) > 10
    assert rules <= RULES.keys()
