"""Copies the repository, and adds the example files that CONTRIBUTING.md shows to the copy."""

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
"""Folders of the repository that a copy needs to run the launcher."""


@dataclass(frozen=True)
class Block:
    """A fenced code block of CONTRIBUTING.md."""

    heading: str
    """Heading of the section that contains the block."""
    language: str
    """Language after the opening fence, such as ``python``."""
    text: str
    """Text between the fences."""

    @property
    def file(self) -> str:
        """Returns the path of the example file; the block's first line is ``# PATH``."""
        return self.text.split("\n", 1)[0].removeprefix("# ")

    def write(self, root: Path) -> None:
        """Writes the block, without its first line, to ``file`` below ``root``."""
        path = root / self.file
        path.parent.mkdir(exist_ok=True)
        path.write_text(self.text.split("\n", 1)[1])


def blocks(heading: str) -> list[Block]:
    """Returns the blocks of a section, in order; ``heading`` is without its ``#`` characters."""
    # A section ends at the next heading of any level, or at the end of the text.
    [section] = re.findall(rf"^#+ {heading}\n(.*?)(?=^#+ |\Z)", hide_comments(TEXT), re.M | re.S)
    fenced = re.findall(r"```(\w+)\n(.*?)```", section, re.S)
    return [Block(heading, language, text.replace("\0", "#")) for language, text in fenced]


def hide_comments(text: str) -> str:
    """Replaces "#" in fenced blocks with NUL, because code comments look like headings."""
    return re.sub(r"```.*?```", lambda match: match[0].replace("#", "\0"), text, flags=re.S)


def copy_with(root: Path, *headings: str) -> Path:
    """Copies the repository's packages to ``root``; returns ``root``.

    Also writes the example files of the sections of CONTRIBUTING.md that have these headings.
    """
    for name in PACKAGES:
        shutil.copytree(REPO_ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO_ROOT / "pyproject.toml", root)
    for heading in headings:
        for block in blocks(heading):
            if block.language != "bash":  # a bash block has commands, not a file
                block.write(root)
    return root


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python ARGUMENTS`` in a copy, with the copy's packages instead of the repository's."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
