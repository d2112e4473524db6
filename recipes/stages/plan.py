"""What the chain will take, before it takes it: memory, time and money, and cheaper layouts."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from recipes.core.files import write_json
from recipes.core.manifest import Outcome
from recipes.core.processes import cores
from recipes.core.stage import Inputs, StageConfig, metrics_log
from recipes.planning import machine
from recipes.planning.chain import Chain
from recipes.planning.estimate import estimate
from recipes.planning.hardware import Hardware
from recipes.planning.machine import Rates
from recipes.planning.results import PlanResult
from recipes.planning.tables import figures, readings_table, tables
from recipes.planning.work import Work
from recipes.planning.workload import Workload
from recipes.stages.contract import Stage

FILE = "plan.json"


@dataclass
class PlanConfig(StageConfig):
    """Settings of ``plan``, all of them put in from the chain."""

    workloads: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Every training, and every pass of a teacher over its text, by stage."""
    readings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Memory and work of every other stage that runs models."""
    hardware: dict[str, Any] = field(default_factory=dict)
    """The profile of the device."""
    from_published_config: bool = False
    """Shapes are the bundled ones, since the model's config.json is out of reach."""


def resolve_from_chain(cfg: PlanConfig, chain: Chain) -> PlanConfig:
    """What a plan is of, as a part of its own settings: a change there is a new plan."""
    hardware = replace(chain.hardware, memory_bytes=chain.hardware.memory_of_rank(1))
    return replace(
        cfg,
        workloads={name: workload.as_dict() for name, workload in chain.workloads.items()},
        readings={
            name: {"memory": found.memory.total, "work": asdict(found.work), "bf16": found.bf16}
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
    if hardware.measure and (rates := _rates()) is not None:
        hardware = replace(hardware, **asdict(rates))
    jobs = {name: estimate(job, hardware) for name, job in workloads.items()}
    readings = _readings(cfg, hardware)
    hours = {
        **{name: job.hours for name, job in jobs.items()},
        **{name: taken for name, (_, taken) in readings.items()},
    }
    result = PlanResult(
        figures(workloads, hardware, cfg.from_published_config),
        [
            *tables(workloads, hardware),
            *([readings_table(readings, hardware)] if readings else []),
        ],
        {name: job.tokens_per_second for name, job in jobs.items()},
        {name: 3600 * taken for name, taken in hours.items()},
    )
    write_json(out / FILE, asdict(result))
    metrics_log(out).progress("plan", 1, 1)
    return Outcome(result)


def _rates() -> Rates | None:
    """This machine's, from the cache or measured in seconds; none where there is no torch.

    What was measured beside other programs is used, but not kept.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS") or cores())
    if (rates := machine.kept(threads)) is not None:
        return rates
    if importlib.util.find_spec("torch") is None:
        return None
    from recipes.engines.machine_rates import training_rates

    rates, alone = training_rates(threads)
    if alone:
        machine.keep(threads, rates)
    return rates


def _readings(cfg: PlanConfig, hardware: Hardware) -> dict[str, tuple[float, float]]:
    """Bytes of memory and hours of each stage."""
    return {
        name: (
            found["memory"],
            hardware.compute_seconds(Work(**found["work"]), found["bf16"]) / 3600,
        )
        for name, found in cfg.readings.items()
    }


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
