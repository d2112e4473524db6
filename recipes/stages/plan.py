"""What the chain will take, before it takes it: memory, time and money, and cheaper layouts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from recipes.core.files import write_json
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, StageConfig, metrics_log
from recipes.planning.chain import Chain
from recipes.planning.hardware import Hardware
from recipes.planning.results import PlanResult
from recipes.planning.tables import figures, readings_table, tables
from recipes.planning.workload import Workload
from recipes.stages.contract import Stage

FILE = "plan.json"


@dataclass
class PlanConfig(StageConfig):
    """Settings of ``plan``, all of them put in from the chain."""

    workloads: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Every training, and every pass of a teacher over its text, by stage."""
    readings: dict[str, dict[str, float]] = field(default_factory=dict)
    """Memory and hours of every stage that only runs models forward."""
    hardware: dict[str, Any] = field(default_factory=dict)
    from_published_config: bool = False
    """Shapes are the bundled ones, since the model's config.json is out of reach."""


def resolve_from_chain(cfg: PlanConfig, chain: Chain) -> PlanConfig:
    """What a plan is of, as a part of its own settings: a change there is a new plan."""
    hardware = replace(chain.hardware, memory_bytes=chain.hardware.memory_of_rank(1))
    return replace(
        cfg,
        workloads={name: workload.as_dict() for name, workload in chain.workloads.items()},
        readings={
            name: {"bytes": found.memory.total, "hours": found.hours(chain.hardware)}
            for name, estimates in chain.readings.items()
            for found in (estimates(chain.stages[name]),)
        },
        hardware=asdict(hardware),
        from_published_config=chain.from_published_config,
    )


def run(cfg: PlanConfig, inputs: Inputs, out: Path) -> Outcome:
    """Estimates every workload and searches for layouts that cost less."""
    workloads = {name: Workload.of(plain) for name, plain in cfg.workloads.items()}
    hardware = Hardware(**cfg.hardware)
    result = PlanResult(
        figures(workloads, hardware, cfg.from_published_config),
        [
            *tables(workloads, hardware),
            *([readings_table(cfg.readings, hardware)] if cfg.readings else []),
        ],
    )
    write_json(out / FILE, asdict(result))
    metrics_log(out).progress("plan", 1, 1)
    return Outcome(result)


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
