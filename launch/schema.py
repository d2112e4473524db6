"""Stage schemas for Hydra: found by their folder in ``conf/stage``, not listed anywhere."""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from launch.plan import stage_module
from recipes.hardware import cpu_profile

CONF = Path(__file__).resolve().parent.parent / "conf"


def register() -> None:
    """Registers every stage's ``Config`` as ``stage/<stage>/schema``, and ``${cpu:NAME}``."""
    OmegaConf.register_new_resolver("cpu", cpu_profile, replace=True)
    store = ConfigStore.instance()
    for folder in sorted((CONF / "stage").iterdir()):
        store.store(
            group=f"stage/{folder.name}", name="schema", node=stage_module(folder.name).Config
        )


def recipes() -> dict[str, str]:
    """Recipe names and their one-line descriptions."""
    files = sorted((CONF / "recipe").glob("*.yaml"))
    return {file.stem: str(OmegaConf.select(OmegaConf.load(file), "description")) for file in files}
