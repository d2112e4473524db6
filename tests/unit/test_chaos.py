"""Tests ``python -m tests.chaos`` with a fake campaign instead of one that kills runs at random."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from tests.chaos import __main__ as chaos


@pytest.mark.parametrize("problems", [[], ["a difference"]])
def test_the_folder_is_kept_and_the_exit_status_is_1_only_after_a_problem(
    problems: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(chaos, "run_campaign", lambda folder, arguments: problems)
    monkeypatch.setattr(sys, "argv", ["chaos"])
    assert chaos.main() == bool(problems)  # the exit status, 0 or 1
    assert len(list(tmp_path.iterdir())) == bool(problems)
