"""What a campaign of ``python -m tests.chaos`` leaves behind; what it finds is run by hand."""

from __future__ import annotations

import sys
import tempfile
from typing import TYPE_CHECKING

import pytest

from tests.chaos import __main__ as chaos
from tests.chaos.faults import FAULTS

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("problems", [(), ("a difference",)])
def test_only_a_problem_leaves_a_folder(
    problems: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(chaos, "prepare", lambda place, words: {})
    monkeypatch.setitem(FAULTS, "made-up", lambda base, run, command: iter(problems))
    monkeypatch.setattr(sys, "argv", ["chaos", "--faults", "made-up"])
    assert chaos.main() == len(problems)
    left = [str(folder) for folder in tmp_path.iterdir()]
    assert len(left) == len(problems)
    assert all(folder in capsys.readouterr().out for folder in left)
