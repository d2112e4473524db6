"""A stage as it is planned: resolved, with its fingerprint and what is to be done with it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from recipes.core.errors import require_known
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import Manifest, read_manifest
from recipes.core.stage import StageConfig
from recipes.planning.chain import Chain
from recipes.planning.workload import Workload
from recipes.stages.contract import Stage


@dataclass(frozen=True)
class InputRef:
    """Where an input is, and what it must be."""

    directory: Path
    kind: str
    fingerprint: str


@dataclass(frozen=True)
class PlannedStage:
    """One stage, resolved: what to start, and whether to."""

    name: str
    directory: Path
    config: StageConfig
    inputs: Mapping[str, InputRef]
    code: str
    fingerprint: str
    action: str
    reason: str
    chain: Chain = field(repr=False, compare=False)

    @property
    def stage(self) -> Stage[Any]:
        """What it is."""
        return stage_of(self.config)

    @property
    def module(self) -> str:
        """What is started."""
        return module_of(self.config.stage)

    @property
    def workload(self) -> Workload | None:
        """Its training or pass over text; ``None`` for any other stage."""
        return self.chain.workloads.get(self.name)

    @property
    def needs_gpu(self) -> bool:
        """Whether it uses GPUs where there are some."""
        return self.stage.needs_gpu(self.config, self.chain)

    @property
    def made(self) -> Manifest | None:
        """What it has made, as it is planned; ``None`` where that is not complete."""
        manifest = read_manifest(self.directory)
        return manifest if manifest and manifest.fingerprint == self.fingerprint else None

    def request(self) -> dict[str, Any]:
        """Content of the stage's ``config.yaml``."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "code": self.code,
            "inputs": {
                name: {**vars(ref), "directory": str(ref.directory)}
                for name, ref in self.inputs.items()
            },
            "config": OmegaConf.to_container(OmegaConf.structured(self.config)),
        }


def stage_names() -> list[str]:
    """Every kind of stage: the folders of ``conf/stage``, each a module of ``recipes.stages``."""
    return sorted(folder.name for folder in (REPO_ROOT / "conf" / "stage").iterdir())


def stage_of(config: StageConfig) -> Stage[Any]:
    """The stage that a config is for."""
    return load_stage(config.stage)


@cache
def load_stage(name: str) -> Stage[Any]:
    """Imports a stage, or refuses its name; none of them imports torch at its top."""
    require_known(name, stage_names(), f"there is no kind of stage '{name}'")
    stage: Stage[Any] = importlib.import_module(module_of(name)).STAGE
    return stage


def module_of(name: str) -> str:
    """The module of a stage."""
    return f"recipes.stages.{name}"
