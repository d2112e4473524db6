"""Estimates memory, time and money of all stages of a run, and lists cheaper parallel layouts."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from nemo_convert.architecture import Architecture
from recipes.core.constraints import PositiveOrZero
from recipes.core.files import write_json
from recipes.core.fingerprint import digest
from recipes.core.manifest import Outcome
from recipes.core.processes import cores
from recipes.core.stage import Inputs, StageConfig, metrics_log
from recipes.core.versions import installed_version
from recipes.core.wheels import cache_dir
from recipes.engines.results import TrainingRates
from recipes.planning.chain import Chain
from recipes.planning.hardware import Hardware, cpuinfo
from recipes.planning.inference_cost import InferenceCost
from recipes.planning.layouts import proposals
from recipes.planning.limits import preparation_seconds
from recipes.planning.results import Cell, PlanResult, Table
from recipes.planning.training_cost import (
    TrainingCost,
    gathering_bytes,
    gathering_seconds,
    stopping_seconds,
    training_cost,
)
from recipes.planning.transformer import forward_flops
from recipes.planning.workload import Workload
from recipes.stages.contract import Stage

FILE = "plan.json"
RATES_FOLDER = "machines"
RATES_FORMAT = 3
"""Version of the cached rates. Increase it if the measurement changes."""
VARIABLE_INFO = (
    "processor", "cpu MHz", "core id", "apicid", "initial apicid", "bogomips", "BogoMIPS",
)  # fmt: skip
"""Beginnings of lines of ``/proc/cpuinfo`` that differ between cores or change over time."""
T = TypeVar("T")
Row = dict[str, Cell]
"""Cell by column."""
Costs = Mapping[str, tuple[Workload, TrainingCost]]
"""Workload and cost by stage."""


@dataclass
class PlanConfig(StageConfig):
    """Settings of ``plan``, computed from the other stages. If one changes, ``plan`` runs again."""

    workloads: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Fields of a ``Workload`` by stage, for stages that train or that cache a teacher's logits."""
    inference_costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Fields of an ``InferenceCost`` by stage, for the other stages that run models."""
    preparation_seconds: dict[str, PositiveOrZero] = field(default_factory=dict)
    """Expected seconds of each stage that tokenizes text of a known size."""
    not_estimated: list[str] = field(default_factory=list)
    """Stages whose time is not estimated, such as builds of OpenVINO engines."""
    hardware: dict[str, Any] = field(default_factory=dict)
    """Fields of ``Hardware``: the hardware profile."""
    from_published_config: bool = False
    """Whether shapes come from a bundled copy of the config, because config.json cannot be read."""


def resolve_from_chain(cfg: PlanConfig, chain: Chain) -> PlanConfig:
    """Copies workloads, costs and hardware from the chain."""
    # If the hardware profile sets no memory, ``memory_of_rank`` returns the machine's memory.
    hardware = replace(chain.hardware, memory_bytes=chain.hardware.memory_of_rank(1))
    preparation = preparation_seconds(chain)
    estimated = {cfg.name, *chain.workloads, *chain.inference_costs, *preparation}
    return replace(
        cfg,
        workloads={name: asdict(workload) for name, workload in chain.workloads.items()},
        inference_costs={name: asdict(cost) for name, cost in chain.inference_costs.items()},
        preparation_seconds=preparation,
        not_estimated=[name for name in chain.stages if name not in estimated],
        hardware=asdict(hardware),
        from_published_config=chain.from_published_config,
    )


def run(cfg: PlanConfig, inputs: Inputs, out: Path) -> Outcome:
    """Computes the costs of stages, and lists cheaper layouts of the last training."""
    workloads = {name: _typed(Workload, plain) for name, plain in cfg.workloads.items()}
    inference = {name: _typed(InferenceCost, plain) for name, plain in cfg.inference_costs.items()}
    hardware = Hardware(**cfg.hardware)
    if hardware.measure and (rates := _machine_rates()) is not None:
        hardware = replace(hardware, **asdict(rates))  # the measured rates
    costs: Costs = {
        name: (workload, training_cost(workload, hardware)) for name, workload in workloads.items()
    }
    hours = {name: cost.hours for name, (_, cost) in costs.items()}
    hours |= {name: cost.hours(hardware) for name, cost in inference.items()}
    preparation = {name: seconds / 3600 for name, seconds in cfg.preparation_seconds.items()}
    hours |= preparation
    tokenization: list[Row] = [
        {"stage": name, "hours": f"{number:.2f}"} for name, number in preparation.items()
    ]
    result = PlanResult(
        summary=summary_of(costs, hardware, cfg.from_published_config),
        tables=[
            *tables(costs, hardware),
            *_table("Other stages", _inference_rows(inference, hardware)),
            *_table("Tokenization", tokenization),
            *_table("Time not estimated", ({"stage": name} for name in cfg.not_estimated)),
        ],
        tokens_per_second={name: cost.tokens_per_second for name, (_, cost) in costs.items()},
        seconds={name: 3600 * stage_hours for name, stage_hours in hours.items()},
    )
    write_json(out / FILE, asdict(result))
    metrics_log(out).progress("plan", 1, 1)
    return Outcome(result)


def _typed(cls: type[T], plain: dict[str, Any]) -> T:
    """Restores a dataclass and its nested dataclasses from the output of ``asdict``."""
    typed: T = TypeAdapter(cls).validate_python(plain)
    return typed


def _machine_rates() -> TrainingRates | None:
    """Reads this machine's rates from the cache, or measures them.

    Returns ``None`` if the cache has no rates and torch, which measures them, is not installed.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS") or cores())
    if (rates := read_rates(threads)) is not None:
        return rates
    if importlib.util.find_spec("torch") is None:
        return None
    from recipes.engines.machine_rates import training_rates

    rates, is_undisturbed = training_rates(threads)
    if is_undisturbed:  # no other programs ran during the measurement
        write_rates(threads, rates)
    return rates


def read_rates(threads: int) -> TrainingRates | None:
    """Reads this machine's rates from the user's cache; ``None`` if it has no valid rates."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return TrainingRates(**json.loads(_rates_file(threads).read_text(encoding="utf-8")))
    return None


def write_rates(threads: int, rates: TrainingRates) -> None:
    """Writes rates to the user's cache, if it is writable."""
    file = _rates_file(threads)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(rates))


def _rates_file(threads: int) -> Path:
    """Returns the cache file, named by a digest of all that may change the rates."""
    lines = {line for line in cpuinfo().splitlines() if not line.startswith(VARIABLE_INFO)}
    key = {
        "processor": "\n".join(sorted(lines)),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": installed_version("torch"),
        "format": RATES_FORMAT,
    }
    return cache_dir() / RATES_FOLDER / f"{digest(key)[:32]}.json"


def summary_of(costs: Costs, hardware: Hardware, from_published_config: bool) -> dict[str, Cell]:
    """Returns the assumed hardware, sums over all workloads, and the largest memory, by label."""
    training_costs = [cost for _, cost in costs.values()]
    largest_memory = max((cost.memory.total for cost in training_costs), default=0)
    return {
        "hardware": hardware.name,
        "GFLOP/s in bfloat16": round(hardware.flops_per_second / 1e9),
        "GFLOP/s in float32": round(hardware.float32_flops_per_second / 1e9),
        "GB/s of memory": round(hardware.bytes_per_second / 1e9, 1),
        "utilisation (assumed)": hardware.utilisation,
        "dollars per device-hour (assumed)": hardware.price_per_hour,
        "shape of the teacher": "from a bundled copy, since config.json cannot be read"
        if from_published_config
        else "from its config.json",
        "tokens": sum(workload.tokens for workload, _ in costs.values()),
        # Three significant digits.
        "FLOPs": float(f"{sum(cost.flops for cost in training_costs):.3g}"),
        "hours": _rounded(sum(cost.hours for cost in training_costs)),
        "device-hours": _rounded(sum(cost.device_hours for cost in training_costs)),
        "dollars": _rounded(sum(cost.dollars for cost in training_costs)),
        "not in these totals": "stages of the tables 'Other stages', 'Tokenization' and 'Time not "
        "estimated', such as builds of engines",
        "memory of a rank, GB": round(largest_memory / 1e9, 1),
        "memory available, GB": round((hardware.memory_bytes or 0) / 1e9, 1),
    }


def tables(costs: Costs, hardware: Hardware) -> list[Table]:
    """Returns tables of all workloads, and on GPUs a table of layouts of the last training."""
    all_tables = [
        *_table("Models", _model_rows(costs)),
        *_table("Memory of the rank that needs most, GB", _memory_rows(costs, hardware)),
        *_table("Seconds per step", _time_rows(costs, hardware)),
        *_table("Time and money", _cost_rows(costs, hardware)),
    ]
    trainings = [(name, workload) for name, (workload, _) in costs.items() if workload.trained]
    if trainings and hardware.on_gpu:
        name, workload = trainings[-1]
        title = f"Layouts of {name} that fit into memory, the cheapest first"
        all_tables += _table(title, _layout_rows(workload, hardware))
    return all_tables


def _table(title: str, row_iterable: Iterable[Row]) -> list[Table]:
    """Returns a list with one table, or an empty list if there are no rows.

    All rows must have the same columns in the same order.
    """
    rows = list(row_iterable)
    cells = [list(row.values()) for row in rows]
    return [Table(title, list(rows[0]), cells)] if rows else []


def _model_rows(costs: Costs) -> Iterable[Row]:
    """Yields a row for each distinct architecture, named after the first stage that has it."""
    seen: list[Architecture] = []
    for name, (workload, _) in costs.items():
        for role, arch in (("trained", workload.trained), ("teacher", workload.teacher)):
            if arch is None or arch in seen:
                continue
            seen.append(arch)
            yield {
                "model": f"{name}: {role}",
                "layers": arch.num_layers,
                "hidden": arch.hidden_size,
                "feed-forward": arch.moe_ffn_hidden_size or arch.ffn_hidden_size,
                "heads": f"{arch.num_attention_heads}/{arch.num_query_groups}",  # query/key-value
                "vocabulary": arch.vocab_size,
                "parameters": _short(arch.parameters()),
                "bf16 GB": f"{2 * arch.parameters() / 1e9:.2f}",
                "FLOPs/token": _short(forward_flops(arch, workload.seq_length)),
            }


def _inference_rows(costs: Mapping[str, InferenceCost], hardware: Hardware) -> Iterable[Row]:
    for name, cost in costs.items():
        yield {
            "stage": name,
            "GB": f"{cost.memory.total / 1e9:.1f}",
            "available": f"{hardware.memory_of_rank(cost.ranks_on_node) / 1e9:.1f}",
            "hours": f"{cost.hours(hardware):.2f}",
        }


def _memory_rows(costs: Costs, hardware: Hardware) -> Iterable[Row]:
    for name, (workload, cost) in costs.items():
        yield {
            "stage": name,
            "layout": _layout_text(workload),
            # A column for each field of ``Memory``.
            **{use: f"{size / 1e9:.2f}" for use, size in vars(cost.memory).items()},
            "total": f"{cost.memory.total / 1e9:.1f}",
            "available": f"{hardware.memory_of_rank(workload.layout.devices) / 1e9:.1f}",
            "host memory to save": f"{gathering_bytes(workload) / 1e9:.1f}",
        }


def _time_rows(costs: Costs, hardware: Hardware) -> Iterable[Row]:
    for name, (workload, cost) in costs.items():
        yield {
            "stage": name,
            # A column for each field of ``StepTime``.
            **{cause.replace("_", " "): f"{time:.3g}" for cause, time in vars(cost.step).items()},
            "total": f"{cost.step.total:.3g}",
            "tokens/s": f"{cost.tokens_per_second:,.0f}",
            "seconds to save": f"{gathering_seconds(workload, hardware):.3g}",
            "seconds to stop": f"{stopping_seconds(workload, hardware):.3g}",
        }


def _cost_rows(costs: Costs, hardware: Hardware) -> Iterable[Row]:
    for name, (workload, cost) in costs.items():
        # A CPU node is one device, however many ranks it has.
        devices = workload.layout.ranks if hardware.on_gpu else workload.layout.nodes
        yield {
            "stage": name,
            "on": f"{hardware.name} × {devices}",
            "tokens": _short(workload.tokens),
            "steps": f"{workload.steps:,}",
            "FLOPs": f"{cost.flops:.3g}",
            "hours": f"{cost.hours:.2f}",
            "device-hours": f"{cost.device_hours:,.1f}",
            "dollars": f"{cost.dollars:,.2f}",
        }


def _layout_rows(workload: Workload, hardware: Hardware) -> Iterable[Row]:
    for proposal in proposals(workload, hardware):
        cost = proposal.cost
        yield {
            "devices": proposal.workload.layout.ranks,
            "layout": _layout_text(proposal.workload),
            "GB": f"{cost.memory.total / 1e9:.1f}",
            "tokens/s": f"{cost.tokens_per_second:,.0f}",
            "hours": f"{cost.hours:,.1f}",
            "device-hours": f"{cost.device_hours:,.0f}",
            "dollars": f"{cost.dollars:,.0f}",
        }


def _layout_text(workload: Workload) -> str:
    """Formats a layout, such as ``TP=2 DP=4 micro 1 SP``: micro batch size 1, sequence parallel."""
    layout = workload.layout
    sizes = {"TP": layout.tensor, "PP": layout.pipeline, "CP": layout.context, "EP": layout.expert}
    words = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    words += [f"DP={layout.data}", f"micro {layout.micro_batch_size}"]
    if layout.sequence_parallel:
        words.append("SP")
    if layout.recompute_granularity != "none":
        words.append(f"recompute {layout.recompute_granularity}")
    return " ".join(words)


def _rounded(number: float) -> float:
    """Rounds a number below 100 to two decimals, and a larger number to an integer."""
    return round(number) if number >= 100 else round(number, 2)


def _short(number: float) -> str:
    """Formats a number with at most three significant digits and a unit: 1.23 M, 4.5 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


STAGE = Stage(
    config=PlanConfig,
    kind="plan",
    run=run,
    single_rank_reason="the stage takes only a moment",
    needs_torch=False,
    needs_gpu=lambda config, chain: False,
    resolve_from_chain=resolve_from_chain,
)
