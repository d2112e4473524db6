"""Tests the Dockerfile as text, without building images."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from launch.executors.docker import DockerConfig
from recipes.core.files import REPO_ROOT

DOCKERFILE = REPO_ROOT / "Dockerfile"


def test_hadolint_reports_nothing_about_the_dockerfile() -> None:
    subprocess.run([Path(sys.executable).with_name("hadolint"), DOCKERFILE], check=True)


def test_builds_check_the_interpreter_that_jobs_call() -> None:
    """Jobs call ``python``, so the checks in the Dockerfile must not call ``python3``."""
    assert "python3" not in DOCKERFILE.read_text()
    assert DockerConfig().python == "python"


def test_image_does_not_run_as_root_and_holds_no_secret() -> None:
    text = DOCKERFILE.read_text()
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    users = [re.findall(r"^USER (\S+)", stage, flags=re.MULTILINE) for stage in stages]
    # The first stage only provides the program uv. The others are the images engine and recipes.
    assert users == [[], ["10001"], ["10001"]]
    assert not re.findall(r"^(?:ARG|ENV) .*(?:TOKEN|KEY|SECRET|PASS)", text, flags=re.MULTILINE)
    # Copying the whole checkout could copy files with secrets.
    assert not re.findall(r"^(?:COPY|ADD) \.", text, flags=re.MULTILINE)
