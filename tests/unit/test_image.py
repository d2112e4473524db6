"""The Dockerfile, as far as it can be checked without building it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from launch.executors.docker import DockerConfig
from recipes.core.files import REPO_ROOT

DOCKERFILE = REPO_ROOT / "Dockerfile"


def test_dockerfile_is_clean() -> None:
    subprocess.run([Path(sys.executable).with_name("hadolint"), DOCKERFILE], check=True)


def test_builds_check_the_interpreter_that_jobs_call() -> None:
    assert "python3" not in DOCKERFILE.read_text()
    assert DockerConfig().python == "python"


def test_image_does_not_run_as_root_and_holds_no_secret() -> None:
    text = DOCKERFILE.read_text()
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    users = [re.findall(r"^USER (\S+)", stage, flags=re.MULTILINE) for stage in stages]
    assert users == [[], ["10001"], ["10001"]]  # the first stage only provides uv for the others
    assert not re.findall(r"^(?:ARG|ENV) .*(?:TOKEN|KEY|SECRET|PASS)", text, flags=re.MULTILINE)
    assert not re.findall(r"^(?:COPY|ADD) \.", text, flags=re.MULTILINE)
