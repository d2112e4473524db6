"""What the chain will take, before it takes it: memory, time and money, and cheaper layouts."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from recipes.budget import jobs_of
from recipes.hardware import Hardware
from recipes.manifest import Outcome, write_text_atomically
from recipes.plan_tables import figures, tables
from recipes.planner import Job
from recipes.preflight import Chain, Problem, one_rank_problems
from recipes.stage import Inputs, StageConfig, metrics_log, stage_main

KIND = "plan"
INPUTS: dict[str, str] = {}
LIGHT = True
"""Needs no torch; where torchrun starts every other stage, it does not start this one."""
FILE = "plan.json"


@dataclass
class Config(StageConfig):
    """Settings of ``plan``, all of them put in from the chain."""

    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Every training, and every pass of a teacher over its text, by stage."""
    hardware: dict[str, Any] = field(default_factory=dict)
    recalled: bool = False
    """Shapes are the bundled ones, since the model's config.json is out of reach."""


def of_chain(cfg: Config, chain: Chain) -> Config:
    """What a plan is of, as a part of its own settings: a change there is a new plan."""
    hardware = replace(chain.hardware, memory_bytes=chain.hardware.memory_of_rank(1))
    jobs = {name: job.as_dict() for name, job in jobs_of(chain).items()}
    return replace(cfg, jobs=jobs, hardware=asdict(hardware), recalled=chain.recalled)


def check(cfg: Config, chain: Chain) -> Iterator[Problem]:
    """What is planned must be possible, also when the plan is all that is asked for."""
    yield from one_rank_problems(cfg, "it is arithmetic")
    for config in chain.stages.values():
        module = importlib.import_module(f"recipes.{config.stage}")
        if hasattr(module, "job"):
            yield from module.check(config, chain)


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Estimates every job and searches for layouts that cost less."""
    jobs = {name: Job.of(plain) for name, plain in cfg.jobs.items()}
    hardware = Hardware(**cfg.hardware)
    metrics = {
        "figures": figures(jobs, hardware, cfg.recalled),
        "tables": tables(jobs, hardware),
    }
    write_text_atomically(out / FILE, json.dumps(metrics, indent=1) + "\n")
    metrics_log(out).progress("plan", 1, 1)
    return Outcome(metrics=metrics)


if __name__ == "__main__":
    stage_main(run, Config, KIND)
