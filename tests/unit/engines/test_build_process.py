"""Tests the process that builds a TensorRT engine, with a fake builder."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from pathlib import Path

import pytest

from recipes.core.errors import RecipeError
from recipes.engines import tensorrt_llm
from tests.unit.engines.configs import config


def test_the_builder_dies_with_its_stage_and_its_workspace_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake builder records its workspace and its death signal, and fails with status 3.

    Its last argument is the request file. TensorRT-LLM first writes the engine to the workspace,
    which must be on the file system of the run.
    """
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    fake_builder = """
import ctypes, json, pathlib, sys
death_signal = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(death_signal))  # PR_GET_PDEATHSIG
workspace = pathlib.Path(json.loads(pathlib.Path(sys.argv[-1]).read_text())["llm"]["workspace"])
(workspace / "part.engine").write_bytes(b"engine")
pathlib.Path("record.json").write_text(json.dumps([str(workspace), death_signal.value]))
sys.exit(3)
"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(tensorrt_llm.LAUNCHER, shlex.join([sys.executable, "-c", fake_builder]))
    out = tmp_path / "work" / "artifact"
    out.mkdir(parents=True)
    with pytest.raises(RecipeError, match="ended with status 3"):
        tensorrt_llm.build(config(), tmp_path, out)
    workspace, death_signal = json.loads((tmp_path / "record.json").read_text())
    assert Path(workspace).parent == out.parent
    assert not Path(workspace).exists()
    assert death_signal == signal.SIGKILL
