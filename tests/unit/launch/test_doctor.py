"""``doctor`` on this machine, and on simulated machines that do not meet the requirements."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from launch import doctor
from recipes.core import versions
from recipes.core.errors import RecipeError
from recipes.core.versions import RESULT_LIBRARIES, Pin
from recipes.planning.rules import RULES
from tests.support.launcher import write_program


def run_doctor(*arguments: str) -> tuple[int, str]:
    """Runs ``doctor`` in this process; returns its exit status and its output."""
    screen = StringIO()
    status = doctor.run(arguments, Console(file=screen, width=200))
    return status, screen.getvalue()


def check_results() -> dict[str, str]:
    """Returns the result of each check (ok, warn or fail), by the first word of its name."""
    return {check.name.split()[0]: check.result for check in doctor.examine()}


def test_doctor_says_that_recipes_can_run_here_without_an_import_of_torch(root: Path) -> None:
    program = "import sys; from launch import run; sys.exit(run.cli() or 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, "doctor"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recipes can run here" in done.stdout
    for check_name in ("megatron-core", "shared memory", "cache", "docker", "tensorrt_llm"):
        assert check_name in done.stdout


def test_every_rule_is_listed_and_a_misspelled_argument_is_refused() -> None:
    status, text = run_doctor("rules")
    assert status == 0
    assert all(rule.name in text for rule in RULES.values())
    assert "NVIDIA/Model-Optimizer#2489" in text  # the reference of one of the rules
    with pytest.raises(RecipeError, match="Did you mean 'rules'"):
        run_doctor("rule")


def test_wrong_and_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(changed_versions: dict[str, str | None]) -> str:
        """Returns the last line of a report with these versions; the report must be a failure."""
        with monkeypatch.context() as patch:
            for module in (versions, doctor):  # ``doctor`` imports the function by name
                patch.setattr(
                    module,
                    "installed_version",
                    lambda name: changed_versions.get(name, real_version(name)),
                )
            status, text = run_doctor()
        assert status == 1
        return text.splitlines()[-1]

    real_version = versions.installed_version
    too_new_and_missing = {"megatron-core": "0.16.0", "omegaconf": None}
    message = "recipes cannot run here: fix omegaconf ==2.3.0, megatron-core ==0.15.3"
    assert report(too_new_and_missing) == message
    # Without RESULT_LIBRARIES, only the launcher seems to be installed. It needs omegaconf.
    without_omegaconf = dict.fromkeys((*RESULT_LIBRARIES, "omegaconf"))
    assert report(without_omegaconf) == "the launcher cannot run here: fix omegaconf ==2.3.0"


def test_a_pin_compares_versions_without_their_build_suffix() -> None:
    for specifier, installed, is_satisfied in (
        (">=2.9,<2.14", "2.13.0+cpu", True),
        (">=2.9,<2.14", "2.9.0a0+50eac811a6.nv25.9", True),  # a build of an NGC container
        (">=2.9,<2.14", "2.14.0", False),
        ("==0.15.3", "0.15.3", True),
        ("==0.15.3", None, False),  # not installed
        ("<2", "1.26.4", True),
    ):
        assert Pin("any-library", specifier, installed).is_satisfied is is_satisfied


def test_a_gpu_needs_a_cuda_build_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    print_gpu = "echo 'NVIDIA H100 80GB HBM3, 81559 MiB, 570.86'"  # name, memory, driver
    write_program(tmp_path / "bin" / "nvidia-smi", print_gpu)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    for cuda, build_result in ((None, "fail"), ("12.8", "ok")):
        # The default value keeps this iteration's version.
        monkeypatch.setattr(doctor, "_cuda_of_torch", lambda cuda=cuda: cuda)
        results = check_results()
        assert results["build"] == build_result  # the check "build of torch"
        assert results["GPU"] == "ok"


def test_the_cuda_version_is_read_from_the_files_of_torch() -> None:
    is_cpu_build = version("torch").endswith("+cpu")
    assert (doctor._cuda_of_torch() is None) == is_cpu_build


def test_checks_of_memory_disk_and_cache_can_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine first meets the requirements, then has too little of each."""
    # Neither folder exists, but ``doctor`` could create both.
    monkeypatch.setenv("NEMO_RECIPES_CACHE", str(tmp_path / "cache" / "deeper"))
    names = ("memory", "disk", "cache")
    results = check_results()
    assert [results[name] for name in names] == ["ok"] * 3
    # 1 GB is less than MIN_MEMORY_BYTES and MIN_DISK_BYTES.
    monkeypatch.setattr(doctor, "physical_memory", lambda: 10**9)
    usage = SimpleNamespace(free=10**9, total=10**12)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr("os.access", lambda *_: False)  # no folder is writable
    results = check_results()
    assert [results[name] for name in names] == ["fail"] * 3
