"""Conversions leave nothing behind when they fail, are stopped or are killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_convert import nemo
from nemo_convert.scratch import scratch_beside
from recipes.core.files import REPO_ROOT
from tests.support.conversion import convert_by_command
from tests.support.disks import small_disk
from tests.support.folder_changes import GENERATION, edit_json


@pytest.mark.parametrize("command", ["to-nemo", "to-hf", "unpack", "pack"])
def test_a_full_disk_gives_one_message(
    command: str,
    odd_llama: Path,
    odd_nemo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nemo.pack(odd_nemo, tmp_path / "packed.nemo")
    arguments = {
        "to-nemo": ("to-nemo", odd_llama),
        "to-hf": ("to-hf", odd_nemo),
        "unpack": ("to-hf", tmp_path / "packed.nemo"),
        "pack": ("to-nemo", "--pack", odd_llama),
    }[command]
    bytes_free = 1200 << 10 if command == "pack" else 300 << 10  # pack: the second copy fails
    with small_disk(tmp_path / "disk") as disk:
        disk.leave_free(bytes_free)
        assert convert_by_command(*arguments, disk.folder / "new" / "target") == 1
        error = capsys.readouterr().err
        assert "No space left on device.\n  fix: free some space" in error
        assert "Traceback" not in error
        assert list(disk.folder.iterdir()) == []


def test_the_folder_of_a_killed_conversion_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.nemo"
    code = (
        "import os, sys; from pathlib import Path\n"
        "from nemo_convert.scratch import scratch_beside\n"
        "with scratch_beside(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, target], cwd=REPO_ROOT, check=False)
    (left,) = tmp_path.iterdir()
    with scratch_beside(target) as first:
        assert f"removed {left}" in capsys.readouterr().out
        with scratch_beside(target):
            assert first.exists(), "a running conversion keeps its folder"
    assert list(tmp_path.iterdir()) == []


PAUSED = """
import runpy
import time
from nemo_convert import parity
parity.require_sound = lambda checkpoint: time.sleep(100)
runpy.run_module("nemo_convert", run_name="__main__", alter_sys=True)
"""
"""Runs ``nemo_convert``, but ``verify`` waits after it has unpacked a checkpoint. Without this, the
verification of a tiny model could end before it is stopped."""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_verify_removes_what_it_unpacked(
    stop: signal.Signals, odd_llama: Path, odd_nemo: Path, tmp_path: Path
) -> None:
    nemo.pack(odd_nemo, tmp_path / "packed.nemo")
    unpacked = tmp_path / "tmp"
    unpacked.mkdir()
    command = [sys.executable, "-c", PAUSED, "verify", tmp_path / "packed.nemo", odd_llama]
    with subprocess.Popen(
        command,
        cwd=REPO_ROOT,
        env=os.environ | {"TMPDIR": str(unpacked)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not list(unpacked.glob("*/weights")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(stop)
        _, error = process.communicate(timeout=120)
    # If the signal arrives in an exec of a string, CPython 3.11 ends itself with SIGINT, though the
    # exception is caught. A shell reports 130 in both cases.
    assert process.returncode in (128 + signal.SIGINT, -signal.SIGINT), error
    assert "Traceback" not in error
    assert list(unpacked.iterdir()) == []


def test_text_that_utf_8_cannot_encode_is_printed(odd_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(odd_llama, tmp_path / "hf")
    settings = {"num_return_sequences": 3, "num_beams": 2, "do_sample": "\ud800"}
    edit_json(GENERATION, **settings)(folder)
    done = subprocess.run(
        [sys.executable, "-m", "nemo_convert", "check", folder],
        cwd=REPO_ROOT,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},  # strict, unlike that of a C locale
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "do_sample=\\ud800" in done.stdout
    assert "Traceback" not in done.stderr
