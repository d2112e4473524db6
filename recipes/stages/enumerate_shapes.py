"""Lists the architectures within a budget that cannot grow on any axis.

An architecture cannot grow if one more step on any axis would exceed the budget.

Reads the teacher's ``config.json``, and a latency model if configured. Writes ``shapes.json``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from nemo_convert.architecture import Architecture
from nemo_convert.hf_config import read_architecture
from nemo_convert.hub import read_hf_config
from recipes.core.errors import RecipeError
from recipes.core.files import write_json
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.results import Cell, PlanResult, Table
from recipes.planning.rules import Problem
from recipes.pruning.targets import searched_shape_problems
from recipes.search.settings import SHAPES_FILE, EnumerateShapesConfig
from recipes.search.space import (
    SHAPE_COSTS,
    Service,
    absolute_limits,
    enumerate_shapes,
    impossible_axes,
    name_of,
)
from recipes.stages.contract import Stage

EMPTY_BUDGET_FIX = (
    "raise the budget (but lower tokens_per_second), or raise max_depth_pruning and "
    "max_width_pruning in space"
)
"""Fix if no architecture fits. Unlike all other limits, ``tokens_per_second`` is a minimum."""
TEACHER_FITS_FIX = (
    "lower the budget (but raise tokens_per_second, which is absolute, not a fraction)"
)
"""Fix if the teacher fits, so that there is nothing to prune."""
SPEED_LIMITS = ("latency_ms", "tokens_per_second")
"""Limits that depend on the speed of the device."""


def check(cfg: EnumerateShapesConfig, chain: Chain) -> Iterator[Problem]:
    """Yields problems of the teacher, the search space and the budget.

    The budget must be set, must fit an architecture, and must not fit the teacher.
    """
    if chain.teacher.num_moe_experts:
        yield Problem(rules.BUDGET, "a search does not support MoE models", "use a dense model")
        return
    if axes := impossible_axes(chain.teacher, cfg.space):
        yield Problem(
            rules.BUDGET,
            f"no size of {' and '.join(axes)} in the space is a multiple of "
            f"tensor_model_parallel_size={cfg.space.tensor_model_parallel_size}",
            "lower space.tensor_model_parallel_size, or allow more sizes in space",
        )
        return
    budget = cfg.budget.limits()
    if not budget:
        names = ", ".join(f"budget.{name}" for name in SHAPE_COSTS)
        yield Problem(rules.BUDGET, "a search needs a budget", f"set one of {names}")
        return
    # A latency model is measured when the search runs. Only then can speed limits be checked.
    is_measured = "latency" in cfg.inputs
    measured_later = SPEED_LIMITS if is_measured else ()
    checked = {name: limit for name, limit in budget.items() if name not in measured_later}
    shapes = enumerate_shapes(chain.teacher, cfg.space, checked, cfg.service)
    if not shapes:
        limits = absolute_limits(chain.teacher, checked, cfg.service)
        yield Problem(rules.BUDGET, f"no architecture fits the budget {limits}", EMPTY_BUDGET_FIX)
    elif is_measured:  # the speed limits, which are not checked, may exclude more shapes
        return
    elif shapes == [chain.teacher]:  # the only listed shape if it is within the budget
        costs = ", ".join(
            f"{name}={SHAPE_COSTS[name](chain.teacher, cfg.service):.6g}" for name in budget
        )
        what = f"the teacher is within the budget: {costs}"
        yield Problem(rules.BUDGET, what, TEACHER_FITS_FIX)
    else:
        yield from searched_shape_problems(cfg.name, shapes)


def resolve_from_chain(cfg: EnumerateShapesConfig, chain: Chain) -> EnumerateShapesConfig:
    """Adds the device to the fingerprint if the budget limits speed."""
    limits_speed = any(name in SPEED_LIMITS for name in cfg.budget.limits())
    return replace(cfg, service=cfg.service.with_speed()) if limits_speed else cfg


def run(cfg: EnumerateShapesConfig, inputs: Inputs, out: Path) -> Outcome:
    """Writes the shapes to ``shapes.json``, and returns them as a table in the result."""
    teacher = read_architecture(read_hf_config(cfg.hf_path), cfg.hf_path)
    cfg = cfg.with_measured_latency(inputs)
    budget = absolute_limits(teacher, cfg.budget.limits(), cfg.service)
    shapes = cfg.shapes(teacher)
    if not shapes:
        raise RecipeError(
            f"no architecture fits the budget {budget} with the measured latency", EMPTY_BUDGET_FIX
        )
    if shapes == [teacher]:
        what = f"the teacher is within the budget {budget} with the measured latency"
        raise RecipeError(what, TEACHER_FITS_FIX)
    write_json(out / SHAPES_FILE, [shape.as_dict() for shape in shapes])
    shapes_table = table(teacher, shapes, cfg.service)
    return Outcome(PlanResult({"shapes": len(shapes), **budget}, [shapes_table]))


def table(teacher: Architecture, shapes: list[Architecture], service: Service) -> Table:
    """Returns a table with a row of ``SHAPE_COSTS`` for the teacher and for each architecture."""
    named_shapes = [("teacher", teacher), *((name_of(shape), shape) for shape in shapes)]
    rows: list[list[Cell]] = [
        [name, *(cost(shape, service) for cost in SHAPE_COSTS.values())]
        for name, shape in named_shapes
    ]
    latency_source = "measured" if service.measured else f"by roofline of {service.device}"
    title = f"Architectures within the budget; latency {latency_source}"
    return Table(title, ["shape", *SHAPE_COSTS], rows)


STAGE = Stage(
    config=EnumerateShapesConfig,
    kind="shapes",
    # With measured latency, the shapes are not known before the run.
    shapes=lambda cfg, chain: [] if "latency" in cfg.inputs else cfg.shapes(chain.teacher),
    run=run,
    check=check,
    single_rank_reason="the stage takes only a moment",
    resolve_from_chain=resolve_from_chain,
    external=lambda cfg: {"config": Path(cfg.hf_path)} if Path(cfg.hf_path).is_dir() else {},
    external_files=("config.json",),
    optional_inputs={"latency": ("latency_model",)},
    needs_torch=False,
    needs_gpu=lambda config, chain: False,
)
