"""What stages run on: the hardware profile, and libraries, images and mounts that must be there."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.errors import RecipeError, did_you_mean
from recipes.hardware import Hardware
from recipes.preflight import Chain, Problem, read_chain
from recipes.stack import pins
from recipes.stage import StageConfig

LOCAL, DOCKER, SLURM = "local", "docker", "slurm"


def chain_of(cfg: DictConfig, configs: Mapping[str, StageConfig], run_dir: Path) -> Chain:
    """The chain, and what it is to run on.

    Raises:
        RecipeError: There is no usable teacher, or the hardware profile has a wrong field.
    """
    chain = read_chain(cfg.model.hf_path, configs)
    try:
        profile = OmegaConf.merge(OmegaConf.structured(Hardware), cfg.hardware)
        hardware: Hardware = OmegaConf.to_object(profile)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or getattr(error, "key", ""))
        near = did_you_mean(key, Hardware.__dataclass_fields__)
        raise RecipeError(f"hardware.{key}: {str(error).splitlines()[0]}.{near}") from error
    if hardware.memory_bytes is None and cfg.cluster.executor == SLURM:
        hardware.memory_bytes = math.inf  # a login node's says nothing of where the jobs run
    return replace(chain, hardware=hardware, run_dir=run_dir, time_limit=cfg.cluster.get("time"))


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
