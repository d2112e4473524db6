"""Lists the shapes that fit a budget, from the teacher's ``config.json`` alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from recipes.architecture import Architecture, read_architecture
from recipes.errors import RecipeError
from recipes.manifest import Outcome, write_text_atomically
from recipes.preflight import Chain, Problem, one_rank_problems
from recipes.search_space import (
    COSTS,
    Budget,
    Measured,
    Service,
    Space,
    enumerate_shapes,
    limits,
    name_of,
)
from recipes.sources import read_hf_config
from recipes.stage import Inputs, StageConfig, stage_main

KIND = "shapes"
INPUTS: dict[str, str] = {}
OPTIONAL_INPUTS = {"latency": "latency_model"}
LIGHT = True
FILE = "shapes.json"


@dataclass
class Config(StageConfig):
    """Settings of ``enumerate_shapes``."""

    hf_path: str = MISSING
    """Folder, hub id, or ``pypi://`` source of the teacher."""
    budget: Budget = field(default_factory=Budget)
    space: Space = field(default_factory=Space)
    service: Service = field(default_factory=Service)

    def shapes(self, teacher: Architecture) -> list[Architecture]:
        """Shapes within the budget, the largest first."""
        return enumerate_shapes(teacher, self.space, self.budget.limits(), self.service)

    def as_measured(self, inputs: Inputs) -> Config:
        """This, with latency as it was measured, where it was."""
        if "latency" not in inputs:
            return self
        line = Measured(**inputs["latency"].manifest.metrics["measured"])
        return replace(self, service=replace(self.service, measured=line))


def check(cfg: Config, chain: Chain) -> Iterator[Problem]:
    """Finds a budget that nothing fits, or that says nothing."""
    yield from one_rank_problems(cfg, "it only counts")
    if chain.teacher.num_moe_experts:
        yield Problem("budget", "the search has no axes for experts", "search a dense model")
        return
    budget = cfg.budget.limits()
    if not budget or min(budget.values()) <= 0:
        yield Problem(
            "budget",
            f"budget={budget} limits nothing" if not budget else f"budget={budget} leaves nothing",
            f"set a positive limit of {', '.join(COSTS)}",
        )
        return
    steps = [n for n in vars(cfg.space) if n.endswith(("divisor", "size"))]
    if any(getattr(cfg.space, name) < 1 for name in steps):
        yield Problem("budget", f"space={vars(cfg.space)} has a step below 1", "use 1 or more")
    elif not cfg.shapes(chain.teacher):
        yield Problem(
            "budget",
            f"no shape fits {limits(chain.teacher, budget, cfg.service)}",
            "raise the budget, or max_depth_pruning and max_width_pruning in space",
        )


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Writes ``shapes.json`` and a table."""
    teacher = read_architecture(read_hf_config(cfg.hf_path), cfg.hf_path)
    cfg = cfg.as_measured(inputs)
    budget = limits(teacher, cfg.budget.limits(), cfg.service)
    shapes = cfg.shapes(teacher)
    if not shapes:
        raise RecipeError(
            f"no shape fits {budget}, with latency as measured.",
            "raise the budget, or max_depth_pruning and max_width_pruning in space",
        )
    text = json.dumps([shape.as_dict() for shape in shapes], indent=1)
    write_text_atomically(out / FILE, text + "\n")
    return Outcome(
        metrics={
            "figures": {"shapes": len(shapes), **budget},
            "tables": [table(teacher, shapes, cfg.service)],
        }
    )


def table(teacher: Architecture, shapes: list[Architecture], service: Service) -> dict[str, Any]:
    """The teacher and the shapes with what each costs."""
    rows = [("teacher", teacher), *((name_of(shape), shape) for shape in shapes)]
    return {
        "title": f"Shapes within the budget; latency {_source(service)}",
        "columns": ["shape", *COSTS],
        "rows": [
            [name, *(cost(shape, service) for cost in COSTS.values())] for name, shape in rows
        ],
    }


def _source(service: Service) -> str:
    return "as measured" if service.measured else f"by roofline of {service.device}"


if __name__ == "__main__":
    stage_main(run, Config, KIND)
