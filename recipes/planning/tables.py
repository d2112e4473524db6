"""A plan as tables and figures, for a terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from nemo_convert.architecture import Architecture
from recipes.planning.estimate import (
    Estimate,
    Memory,
    Step,
    estimate,
    forward_flops,
    stopping_seconds,
)
from recipes.planning.hardware import Hardware
from recipes.planning.layouts import proposals
from recipes.planning.results import Cell, Table
from recipes.planning.workload import ROLES, Workload

MEMORY_PARTS = [part.name for part in fields(Memory)]
STEP_PARTS = [part.name for part in fields(Step)]


def figures(
    jobs: Mapping[str, Workload], hardware: Hardware, from_published_config: bool
) -> dict[str, Cell]:
    """The plan in a few numbers; sums over all jobs, and the memory of the largest."""
    found = [estimate(job, hardware) for job in jobs.values()]
    return {
        "hardware": hardware.name,
        "GFLOP/s in bfloat16": round(hardware.flops_per_second / 1e9),
        "GFLOP/s in float32": round(hardware.float32_flops_per_second / 1e9),
        "GB/s of memory": round(hardware.bytes_per_second / 1e9, 1),
        "utilisation (assumed)": hardware.utilisation,
        "dollars per device-hour (assumed)": hardware.price_per_hour,
        "shape of the teacher": "bundled copy: config.json out of reach"
        if from_published_config
        else "its own",
        "tokens": sum(job.tokens for job in jobs.values()),
        "FLOPs": float(f"{sum(e.flops for e in found):.3g}"),
        "hours": _rounded(sum(e.hours for e in found)),
        "device-hours": _rounded(sum(e.device_hours for e in found)),
        "dollars": _rounded(sum(e.dollars for e in found)),
        "memory of a rank, GB": round(max((e.memory.total for e in found), default=0) / 1e9, 1),
        "memory there is, GB": round((hardware.memory_bytes or 0) / 1e9, 1),
    }


def tables(jobs: Mapping[str, Workload], hardware: Hardware) -> list[Table]:
    """Models, memory, time and cost of every job, and cheaper layouts of the last training."""
    found = {name: (job, estimate(job, hardware)) for name, job in jobs.items()}
    made = [_models(jobs), _memory(found, hardware), _time(found, hardware), _cost(found, hardware)]
    trainings = [(name, job) for name, job in jobs.items() if job.trained is not None]
    if trainings and hardware.on_gpu:
        made.append(_layouts(*trainings[-1], hardware))
    return made


def readings_table(readings: Mapping[str, tuple[float, float]], hardware: Hardware) -> Table:
    """Other stages that run models: bytes of the fullest rank, and hours."""
    rows: list[list[Cell]] = [
        [
            name,
            f"{memory / 1e9:.1f}",
            f"{hardware.memory_of_rank(1) / 1e9:.1f}",
            f"{hours:.2f}",
        ]
        for name, (memory, hours) in readings.items()
    ]
    return Table("Other stages", ["stage", "GB", "there is", "hours"], rows)


def _models(jobs: Mapping[str, Workload]) -> Table:
    rows: list[list[Cell]] = []
    seen: list[Architecture] = []
    for name, job in jobs.items():
        for role in ROLES:
            arch = getattr(job, role)
            if arch is None or arch in seen:
                continue
            seen.append(arch)
            rows.append(
                [
                    f"{name}: {role}",
                    arch.num_layers,
                    arch.hidden_size,
                    arch.moe_ffn_hidden_size or arch.ffn_hidden_size,
                    f"{arch.num_attention_heads}/{arch.num_query_groups}",
                    arch.vocab_size,
                    _short(arch.parameters()),
                    f"{2 * arch.parameters() / 1e9:.2f}",
                    _short(forward_flops(arch, job.seq_length)),
                ]
            )
    columns = ["model", "layers", "hidden", "feed-forward", "heads", "vocabulary", "parameters"]
    return Table("Models", [*columns, "bf16 GB", "FLOPs/token"], rows)


def _memory(found: Mapping[str, tuple[Workload, Estimate]], hardware: Hardware) -> Table:
    rows = [
        [
            name,
            _layout(job),
            *(f"{getattr(e.memory, part) / 1e9:.2f}" for part in MEMORY_PARTS),
            f"{e.memory.total / 1e9:.1f}",
            f"{hardware.memory_of_rank(job.layout.devices) / 1e9:.1f}",
        ]
        for name, (job, e) in found.items()
    ]
    return Table(
        "Memory of the fullest rank, GB", ["stage", "layout", *MEMORY_PARTS, "total", "there is"],
        rows,
    )  # fmt: skip


def _time(found: Mapping[str, tuple[Workload, Estimate]], hardware: Hardware) -> Table:
    rows = [
        [
            name,
            *(f"{getattr(e.step, part):.3g}" for part in STEP_PARTS),
            f"{e.step.total:.3g}",
            f"{e.tokens_per_second:,.0f}",
            f"{stopping_seconds(job, hardware):.3g}",
        ]
        for name, (job, e) in found.items()
    ]
    parts = [part.replace("_", " ") for part in STEP_PARTS]
    return Table("Seconds of a step", ["stage", *parts, "total", "tokens/s", "to stop"], rows)


def _cost(found: Mapping[str, tuple[Workload, Estimate]], hardware: Hardware) -> Table:
    rows = [
        [
            name,
            f"{hardware.name} × {job.layout.ranks if hardware.on_gpu else job.layout.nodes}",
            _short(job.tokens),
            f"{job.steps:,}",
            f"{e.flops:.3g}",
            f"{e.hours:.2f}",
            f"{e.device_hours:,.1f}",
            f"{e.dollars:,.2f}",
        ]
        for name, (job, e) in found.items()
    ]
    columns = ["stage", "on", "tokens", "steps", "FLOPs", "hours", "device-hours", "dollars"]
    return Table("Time and money", columns, rows)


def _layouts(name: str, job: Workload, hardware: Hardware) -> Table:
    rows: list[list[Cell]] = [
        [
            p.job.layout.ranks,
            _layout(p.job),
            f"{p.estimate.memory.total / 1e9:.1f}",
            f"{p.estimate.tokens_per_second:,.0f}",
            f"{p.estimate.hours:,.1f}",
            f"{p.estimate.device_hours:,.0f}",
            f"{p.estimate.dollars:,.0f}",
        ]
        for p in proposals(job, hardware)
    ]
    columns = ["devices", "layout", "GB", "tokens/s", "hours", "device-hours", "dollars"]
    return Table(f"Layouts of {name} that fit, the cheapest first", columns, rows)


def _layout(job: Workload) -> str:
    """TP, PP and so on, as far as they are not 1, with replicas and micro batch."""
    layout = job.layout
    sizes = {"TP": layout.tensor, "PP": layout.pipeline, "CP": layout.context, "EP": layout.expert}
    parts = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    parts += [f"DP={layout.data}", f"micro {layout.micro_batch_size}"]
    if layout.sequence_parallel:
        parts.append("SP")
    if layout.recompute_granularity != "none":
        parts.append(f"recompute {layout.recompute_granularity}")
    return " ".join(parts)


def _rounded(number: float) -> float:
    """Two digits after the point where they say something."""
    return round(number) if number >= 100 else round(number, 2)


def _short(number: float) -> str:
    """1.23 M, 4.5 B and so on, in three digits."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"
