"""Lists the shapes that fit a budget, from the teacher's ``config.json`` alone."""

from __future__ import annotations

from collections.abc import Iterator
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
from recipes.planning.problems import Problem
from recipes.planning.results import PlanResult, Table
from recipes.search.settings import SHAPES_FILE, EnumerateShapesConfig
from recipes.search.space import SHAPE_COSTS, Service, limits, name_of
from recipes.stages.contract import Stage


def check(cfg: EnumerateShapesConfig, chain: Chain) -> Iterator[Problem]:
    """Finds a budget that nothing fits, that the teacher itself does, or that says nothing."""
    if chain.teacher.num_moe_experts:
        yield Problem(rules.BUDGET, "the search has no axes for experts", "search a dense model")
        return
    budget = cfg.budget.limits()
    if not budget:
        yield Problem(rules.BUDGET, "budget limits nothing", f"set one of {', '.join(SHAPE_COSTS)}")
    elif not (shapes := cfg.shapes(chain.teacher)):
        yield Problem(
            rules.BUDGET,
            f"no shape fits {limits(chain.teacher, budget, cfg.service)}",
            "loosen the budget, or raise max_depth_pruning and max_width_pruning in space",
        )
    elif shapes == [chain.teacher] and "latency" not in cfg.inputs:
        costs = ", ".join(
            f"{name}={SHAPE_COSTS[name](chain.teacher, cfg.service):.6g}" for name in budget
        )
        yield Problem(
            rules.BUDGET,
            f"the teacher itself keeps the budget: {costs}",
            "tighten it; tokens_per_second is a number of tokens, not a share",
        )


def run(cfg: EnumerateShapesConfig, inputs: Inputs, out: Path) -> Outcome:
    """Writes ``shapes.json`` and a table."""
    teacher = read_architecture(read_hf_config(cfg.hf_path), cfg.hf_path)
    cfg = cfg.as_measured(inputs)
    budget = limits(teacher, cfg.budget.limits(), cfg.service)
    shapes = cfg.shapes(teacher)
    if not shapes:
        raise RecipeError(
            f"no shape fits {budget}, with latency as measured.",
            "loosen the budget, or raise max_depth_pruning and max_width_pruning in space",
        )
    write_json(out / SHAPES_FILE, [shape.as_dict() for shape in shapes])
    return Outcome(
        PlanResult({"shapes": len(shapes), **budget}, [table(teacher, shapes, cfg.service)])
    )


def table(teacher: Architecture, shapes: list[Architecture], service: Service) -> Table:
    """The teacher and the shapes with what each costs."""
    rows = [("teacher", teacher), *((name_of(shape), shape) for shape in shapes)]
    source = "as measured" if service.measured else f"by roofline of {service.device}"
    return Table(
        f"Shapes within the budget; latency {source}",
        ["shape", *SHAPE_COSTS],
        [[name, *(cost(shape, service) for cost in SHAPE_COSTS.values())] for name, shape in rows],
    )


STAGE = Stage(
    config=EnumerateShapesConfig,
    kind="shapes",
    run=run,
    check=check,
    one_rank="it only counts",
    optional_inputs={"latency": ("latency_model",)},
    needs_torch=False,
    needs_gpu=lambda config, chain: False,
)

if __name__ == "__main__":
    STAGE.main()
