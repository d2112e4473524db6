"""Stage schemas for Hydra: found by their folder in ``conf/stage``, not listed anywhere."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from launch.machine import SLURM
from launch.planned import load_stage, stage_names
from recipes.core.files import REPO_ROOT
from recipes.planning.hardware import cpu_profile

CONF = REPO_ROOT / "conf"


def register() -> None:
    """Registers every stage's config as ``stage/<stage>/schema``, and ``${cpu:NAME}``."""
    OmegaConf.register_new_resolver("cpu", _cpu, replace=True)
    for name in stage_names():
        ConfigStore.instance().store(
            group=f"stage/{name}", name="schema", node=load_stage(name).config
        )


def _cpu(name: str, *, _root_: DictConfig) -> Any:
    """What is looked up of a processor; a login node's is not that of the jobs."""
    return cpu_profile(name, here=OmegaConf.select(_root_, "cluster.executor") != SLURM)


def recipes() -> dict[str, str]:
    """Recipe names and their one-line descriptions."""
    files = sorted((CONF / "recipe").glob("*.yaml"))
    return {file.stem: str(OmegaConf.select(OmegaConf.load(file), "description")) for file in files}
