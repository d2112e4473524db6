"""Writes the example files that CONTRIBUTING.md shows into a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from recipes.core.files import REPO_ROOT

TEXT = (REPO_ROOT / "CONTRIBUTING.md").read_text()
PACKAGES = ("conf", "launch", "nemo_convert", "recipes", "requirements")


@dataclass(frozen=True)
class Block:
    """A fenced block of Markdown."""

    heading: str
    language: str
    text: str

    @property
    def file(self) -> str:
        """Returns the file name, which is the first line of the block."""
        return self.text.split("\n", 1)[0].removeprefix("# ")

    def write(self, root: Path) -> None:
        """Writes the block without its first line to the file."""
        path = root / self.file
        path.parent.mkdir(exist_ok=True)
        path.write_text(self.text.split("\n", 1)[1])


def blocks(heading: str) -> list[Block]:
    """Returns the blocks below a heading, in order."""
    [section] = re.findall(rf"^#+ {heading}\n(.*?)(?=^#+ |\Z)", hide_comments(TEXT), re.M | re.S)
    fenced = re.findall(r"```(\w+)\n(.*?)```", section, re.S)
    return [Block(heading, language, text.replace("\0", "#")) for language, text in fenced]


def hide_comments(text: str) -> str:
    """Replaces "#" in fenced blocks with NUL, because comments look like headings."""
    return re.sub(r"```.*?```", lambda match: match[0].replace("#", "\0"), text, flags=re.S)


def copy_with(root: Path, *headings: str) -> Path:
    """Copies the repository's packages, and adds the files that are below the headings."""
    for name in PACKAGES:
        shutil.copytree(REPO_ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO_ROOT / "pyproject.toml", root)
    for heading in headings:
        for block in blocks(heading):
            if block.language != "bash":
                block.write(root)
    return root


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in the copy, with the copy's packages instead of the repository's."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
