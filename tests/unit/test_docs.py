"""The site of documents, and the pages in it that are written from the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.reference.__main__ import DOCS, PAGES, written
from recipes.core.files import REPO_ROOT
from recipes.planning.rules import RULES

SPELLED_OUT = {
    "KL": "Kullback-Leibler",
    "JSD": "Jensen-Shannon",
    "TP": "tensor parallelism",
    "PP": "pipeline parallelism",
    "DP": "data parallelism",
    "SP": "sequence parallelism",
    "CP": "context parallelism",
    "EP": "expert parallelism",
    "FP8": "8-bit floats",
    "AWQ": "activation-aware",
}
"""What a newcomer may not know."""
READ_FIRST = ("first_model", "your_model", "choose_a_shape", "distil", "runs", "serve", "results")


def test_the_site_is_made_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="it is not installed: make install")
    site = tmp_path / "site"
    command = ["-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(site)]
    done = subprocess.run(
        [sys.executable, *command], cwd=REPO_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = {page.stem for page in (site / "docs").glob("*.html")}
    assert pages == {page.stem for page in DOCS.glob("*.md")}
    start = (site / "docs" / "index.html").read_text(encoding="utf-8")
    assert [name for name in pages if f'href="{name}.html"' not in start] == ["index"]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_the_code_says(name: str) -> None:
    found = (DOCS / name).read_text(encoding="utf-8")
    assert found == written(name), "python -m launch.reference writes it anew"


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_says_what_trips_it(rule: str) -> None:
    text = (DOCS / "trouble.md").read_text(encoding="utf-8")
    assert re.search(rf"\n### {rule}\n\n(Error|Warning): .+\n\n- .+", text)


@pytest.mark.parametrize("page", [REPO_ROOT / "README.md", *(DOCS / f"{n}.md" for n in READ_FIRST)])
def test_an_abbreviation_is_spelled_out_before_it_is_used(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for short, words in SPELLED_OUT.items():
        if used := re.search(rf"\b{short}\b", text):
            line_end = text.index("\n", text.index("\n", used.end()) + 1)
            assert words in " ".join(text[:line_end].split()), f"{short} at {used.start()}"
