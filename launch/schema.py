"""Composes configs with Hydra, and lists the recipes."""

from __future__ import annotations

from functools import cache
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from launch.command_line import hydra_words
from launch.planned import load_stage, stage_names
from recipes.core.files import REPO_ROOT
from recipes.planning.hardware import cpu_profile

CONF = REPO_ROOT / "conf"


@cache
def register() -> None:
    """Registers every stage's config as ``stage/<stage>/schema``, and ``${cpu:NAME}``."""
    OmegaConf.register_new_resolver("cpu", _cpu)
    for name in stage_names():
        ConfigStore.instance().store(
            group=f"stage/{name}", name="schema", node=load_stage(name).config
        )


def _cpu(name: str, *, _root_: DictConfig) -> Any:
    """Returns a value of this machine's CPU profile; or any CPU's, for Slurm's nodes."""
    return cpu_profile(name, here=OmegaConf.select(_root_, "cluster.executor") != "slurm")


def compose(*words: str) -> DictConfig:
    """Composes a config from the words of a command line."""
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", hydra_words(words), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    OmegaConf.set_struct(cfg, True)
    return cfg


def recipes() -> dict[str, str]:
    """Returns the description of each recipe."""
    files = sorted((CONF / "recipe").glob("*.yaml"))
    return {file.stem: str(OmegaConf.select(OmegaConf.load(file), "description")) for file in files}
