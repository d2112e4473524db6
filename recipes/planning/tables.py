"""A plan as tables and metrics, for a terminal and for the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nemo_convert.architecture import Architecture
from recipes.planning.hardware import Hardware
from recipes.planning.inference_cost import InferenceCost
from recipes.planning.layouts import proposals
from recipes.planning.results import Cell, Table
from recipes.planning.training_cost import TrainingCost, stopping_seconds, training_cost
from recipes.planning.transformer import forward_flops
from recipes.planning.workload import Workload

Row = dict[str, Cell]


def figures(
    jobs: Mapping[str, Workload], hardware: Hardware, from_published_config: bool
) -> dict[str, Cell]:
    """Returns a plan in a few numbers: sums over all workloads, and the largest memory."""
    costs = [training_cost(job, hardware) for job in jobs.values()]
    return {
        "hardware": hardware.name,
        "GFLOP/s in bfloat16": round(hardware.flops_per_second / 1e9),
        "GFLOP/s in float32": round(hardware.float32_flops_per_second / 1e9),
        "GB/s of memory": round(hardware.bytes_per_second / 1e9, 1),
        "utilisation (assumed)": hardware.utilisation,
        "dollars per device-hour (assumed)": hardware.price_per_hour,
        "shape of the teacher": "bundled copy: config.json cannot be read"
        if from_published_config
        else "its own",
        "tokens": sum(job.tokens for job in jobs.values()),
        "FLOPs": float(f"{sum(cost.flops for cost in costs):.3g}"),
        "hours": _rounded(sum(cost.hours for cost in costs)),
        "device-hours": _rounded(sum(cost.device_hours for cost in costs)),
        "dollars": _rounded(sum(cost.dollars for cost in costs)),
        "memory of a rank, GB": round(max((c.memory.total for c in costs), default=0) / 1e9, 1),
        "memory there is, GB": round((hardware.memory_bytes or 0) / 1e9, 1),
    }


def tables(jobs: Mapping[str, Workload], hardware: Hardware) -> list[Table]:
    """Returns models, memory, time and cost of all workloads, and layouts of the last training."""
    costs = {name: (job, training_cost(job, hardware)) for name, job in jobs.items()}
    made = [
        *_table("Models", _models(jobs)),
        *_table("Memory of the fullest rank, GB", _memory(costs, hardware)),
        *_table("Seconds of a step", _time(costs, hardware)),
        *_table("Time and money", _cost(costs, hardware)),
    ]
    trainings = [(name, job) for name, job in jobs.items() if job.trained is not None]
    if trainings and hardware.on_gpu:
        name, job = trainings[-1]
        made += _table(f"Layouts of {name} that fit, the cheapest first", _layouts(job, hardware))
    return made


def inference_table(costs: Mapping[str, InferenceCost], hardware: Hardware) -> list[Table]:
    """Returns memory and time of the stages that train nothing."""
    available = hardware.memory_of_rank(1)
    return _table(
        "Other stages",
        (
            {
                "stage": name,
                "GB": f"{cost.memory.total / 1e9:.1f}",
                "there is": f"{available / 1e9:.1f}",
                "hours": f"{cost.hours(hardware):.2f}",
            }
            for name, cost in costs.items()
        ),
    )


def _table(title: str, rows: Iterable[Row]) -> list[Table]:
    """Returns a table of rows with equal columns, or none without rows."""
    listed = list(rows)
    return [Table(title, list(listed[0]), [list(row.values()) for row in listed])] if listed else []


def _models(jobs: Mapping[str, Workload]) -> Iterable[Row]:
    seen: list[Architecture] = []
    for name, job in jobs.items():
        for role, arch in (("trained", job.trained), ("teacher", job.teacher)):
            if arch is None or arch in seen:
                continue
            seen.append(arch)
            yield {
                "model": f"{name}: {role}",
                "layers": arch.num_layers,
                "hidden": arch.hidden_size,
                "feed-forward": arch.moe_ffn_hidden_size or arch.ffn_hidden_size,
                "heads": f"{arch.num_attention_heads}/{arch.num_query_groups}",
                "vocabulary": arch.vocab_size,
                "parameters": _short(arch.parameters()),
                "bf16 GB": f"{2 * arch.parameters() / 1e9:.2f}",
                "FLOPs/token": _short(forward_flops(arch, job.seq_length)),
            }


Costs = Mapping[str, tuple[Workload, TrainingCost]]


def _memory(costs: Costs, hardware: Hardware) -> Iterable[Row]:
    for name, (job, cost) in costs.items():
        available = hardware.memory_of_rank(job.layout.devices)
        yield {
            "stage": name,
            "layout": _layout(job),
            **{part: f"{size / 1e9:.2f}" for part, size in vars(cost.memory).items()},
            "total": f"{cost.memory.total / 1e9:.1f}",
            "there is": f"{available / 1e9:.1f}",
        }


def _time(costs: Costs, hardware: Hardware) -> Iterable[Row]:
    for name, (job, cost) in costs.items():
        parts = {part.replace("_", " "): seconds for part, seconds in vars(cost.step).items()}
        yield {
            "stage": name,
            **{part: f"{seconds:.3g}" for part, seconds in parts.items()},
            "total": f"{cost.step.total:.3g}",
            "tokens/s": f"{cost.tokens_per_second:,.0f}",
            "to stop": f"{stopping_seconds(job, hardware):.3g}",
        }


def _cost(costs: Costs, hardware: Hardware) -> Iterable[Row]:
    for name, (job, cost) in costs.items():
        yield {
            "stage": name,
            "on": f"{hardware.name} × {job.layout.ranks if hardware.on_gpu else job.layout.nodes}",
            "tokens": _short(job.tokens),
            "steps": f"{job.steps:,}",
            "FLOPs": f"{cost.flops:.3g}",
            "hours": f"{cost.hours:.2f}",
            "device-hours": f"{cost.device_hours:,.1f}",
            "dollars": f"{cost.dollars:,.2f}",
        }


def _layouts(job: Workload, hardware: Hardware) -> Iterable[Row]:
    for proposal in proposals(job, hardware):
        cost = proposal.cost
        yield {
            "devices": proposal.job.layout.ranks,
            "layout": _layout(proposal.job),
            "GB": f"{cost.memory.total / 1e9:.1f}",
            "tokens/s": f"{cost.tokens_per_second:,.0f}",
            "hours": f"{cost.hours:,.1f}",
            "device-hours": f"{cost.device_hours:,.0f}",
            "dollars": f"{cost.dollars:,.0f}",
        }


def _layout(job: Workload) -> str:
    """Returns the parallel sizes above 1, the replicas and the micro batch."""
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
    """Rounds to two decimals, or to an integer from 100."""
    return round(number) if number >= 100 else round(number, 2)


def _short(number: float) -> str:
    """Returns three digits and a unit: 1.23 M, 4.5 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"
