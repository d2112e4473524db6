"""What the machine that launches must have: the tested libraries, images and mounts."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from recipes.preflight import Problem
from recipes.stack import pins

LOCAL, DOCKER, SLURM = "local", "docker", "slurm"


def cluster_problems(cluster: DictConfig) -> Iterator[Problem]:
    """Checks where the stages will run, as far as it can be seen from here."""
    if cluster.executor == LOCAL:
        yield from _stack_problems()
    for name, image in (cluster.get("images") or {}).items():
        if image is not None and not _is_there(str(image), str(cluster.executor)):
            yield Problem(
                "image",
                f"cluster.images.{name}={image} is not there",
                "build or import it first; see Dockerfile",
            )
    for mount in cluster.get("mounts") or []:
        path = Path(str(mount).removesuffix(":ro"))
        if not path.is_absolute() or not path.exists():
            yield Problem(
                "mounts",
                f"cluster.mounts: {path} is not there, or not an absolute path",
                "give existing folders, such as /data or /data:ro",
            )


def _stack_problems() -> Iterator[Problem]:
    wrong = [pin for pin in pins() if not pin.holds]
    if wrong:
        listed = ", ".join(f"{p.name} {p.found or 'missing'} ({p.wanted})" for p in wrong)
        yield Problem(
            "stack-versions",
            f"not the tested versions: {listed}",
            "./install.sh, and start with .venv/bin/python; or use cluster=docker",
        )


def _is_there(image: str, executor: str) -> bool:
    """Whether an image is a file that exists, or known to docker here; a registry is not asked."""
    if image.startswith("/") or image.endswith(".sqsh"):
        return Path(image).is_file()
    if executor != DOCKER or shutil.which("docker") is None:
        return True
    command = ["docker", "image", "inspect", "--format", "{{.Id}}", image]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
