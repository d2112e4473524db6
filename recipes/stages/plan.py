"""What the chain will take, before it takes it: memory, time and money, and cheaper layouts."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from recipes.core.files import write_json
from recipes.core.manifest import Outcome
from recipes.core.processes import cores
from recipes.core.stage import Inputs, StageConfig, metrics_log
from recipes.planning.chain import Chain
from recipes.planning.hardware import Hardware, MeasuredRates, read_rates, write_rates
from recipes.planning.inference_cost import InferenceCost
from recipes.planning.results import PlanResult
from recipes.planning.tables import figures, inference_table, tables
from recipes.planning.training_cost import training_cost
from recipes.planning.workload import Workload
from recipes.stages.contract import Stage

FILE = "plan.json"
T = TypeVar("T")


@dataclass
class PlanConfig(StageConfig):
    """Settings of ``plan``. All of them come from the chain, so a change there is a new plan."""

    workloads: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Each training and each teacher's pass over a text, by stage."""
    inference_costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Costs of the other stages that run models."""
    hardware: dict[str, Any] = field(default_factory=dict)
    """The hardware profile."""
    from_published_config: bool = False
    """Whether shapes are the bundled ones, because config.json cannot be read."""


def resolve_from_chain(cfg: PlanConfig, chain: Chain) -> PlanConfig:
    """Copies what the plan is about from the chain."""
    hardware = replace(chain.hardware, memory_bytes=chain.hardware.memory_of_rank(1))
    return replace(
        cfg,
        workloads={name: asdict(workload) for name, workload in chain.workloads.items()},
        inference_costs={name: asdict(cost) for name, cost in chain.inference_costs.items()},
        hardware=asdict(hardware),
        from_published_config=chain.from_published_config,
    )


def run(cfg: PlanConfig, inputs: Inputs, out: Path) -> Outcome:
    """Computes the cost of every stage and searches for cheaper layouts."""
    workloads = {name: _typed(Workload, plain) for name, plain in cfg.workloads.items()}
    inference = {name: _typed(InferenceCost, plain) for name, plain in cfg.inference_costs.items()}
    hardware = Hardware(**cfg.hardware)
    if hardware.measure and (rates := _rates()) is not None:
        hardware = replace(hardware, **asdict(rates))
    trainings = {name: training_cost(job, hardware) for name, job in workloads.items()}
    hours = {name: cost.hours for name, cost in trainings.items()}
    hours |= {name: cost.hours(hardware) for name, cost in inference.items()}
    result = PlanResult(
        figures(workloads, hardware, cfg.from_published_config),
        [*tables(workloads, hardware), *inference_table(inference, hardware)],
        {name: cost.tokens_per_second for name, cost in trainings.items()},
        {name: 3600 * spent for name, spent in hours.items()},
    )
    write_json(out / FILE, asdict(result))
    metrics_log(out).progress("plan", 1, 1)
    return Outcome(result)


def _typed(cls: type[T], plain: dict[str, Any]) -> T:
    """Returns the dataclass that ``asdict`` made plain."""
    typed: T = TypeAdapter(cls).validate_python(plain)
    return typed


def _rates() -> MeasuredRates | None:
    """Returns this machine's rates, from the cache or measured in seconds; ``None`` without torch.

    Rates that were measured while other programs ran are not cached.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS") or cores())
    if (rates := read_rates(threads)) is not None:
        return rates
    if importlib.util.find_spec("torch") is None:
        return None
    from recipes.engines.machine_rates import training_rates

    rates, undisturbed = training_rates(threads)
    if undisturbed:
        write_rates(threads, rates)
    return rates


STAGE = Stage(
    config=PlanConfig,
    kind="plan",
    run=run,
    one_rank="it is arithmetic",
    needs_torch=False,
    needs_gpu=lambda config, chain: False,
    plans_workloads=True,
    resolve_from_chain=resolve_from_chain,
)

if __name__ == "__main__":
    STAGE.main()
