"""A stage as it is planned: resolved, with its fingerprint and what is to be done with it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from recipes.core.errors import require_known
from recipes.core.files import REPO_ROOT
from recipes.core.fingerprint import module_of
from recipes.core.manifest import Manifest
from recipes.core.run_state import InputRef, Request, StageState, Status, stage_state
from recipes.core.stage import StageConfig
from recipes.planning.chain import Chain
from recipes.planning.workload import Workload
from recipes.stages.contract import Stage


@dataclass(frozen=True)
class PlannedStage:
    """One stage, resolved: what to start, and whether to."""

    name: str
    directory: Path
    config: StageConfig
    inputs: Mapping[str, InputRef]
    code: str
    libraries: Mapping[str, str]
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
    def image(self) -> str | None:
        """Its image; ``None`` if it runs in none."""
        return self.chain.image_of(self.config.stage)

    @property
    def needs_gpu(self) -> bool:
        """Whether it uses GPUs where there are some."""
        return self.stage.needs_gpu(self.config, self.chain)

    @property
    def made(self) -> Manifest | None:
        """Its result, as it is planned; ``None`` if that is not complete."""
        state = self.state()
        return state.result if state.status is Status.COMPLETE else None

    def state(self) -> StageState:
        """Reads its state; a result of another fingerprint does not make it complete."""
        return stage_state(self.directory, self.fingerprint)

    def request(self) -> Request:
        """What it is started with."""
        config = asdict(self.config)
        return Request(self.name, self.fingerprint, self.code, self.inputs, config, self.libraries)


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
