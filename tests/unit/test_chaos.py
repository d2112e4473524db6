"""``python -m tests.chaos``. A fake result replaces the campaign, which kills runs at random."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from tests.chaos import __main__ as chaos


@pytest.mark.parametrize("problems", [[], ["a difference"]])
def test_only_a_problem_leaves_a_folder(
    problems: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(chaos, "run_campaign", lambda folder, arguments: problems)
    monkeypatch.setattr(sys, "argv", ["chaos"])
    assert chaos.main() == bool(problems)
    assert len(list(tmp_path.iterdir())) == bool(problems)
