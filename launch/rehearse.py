"""Rehearses a recipe: runs its stages at full size on fake tensors, which have no data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.machine import chain_of
from launch.plan import forced_and_accepted, planned_gates
from launch.planned import load_stage, stage_of
from launch.settings import RunSettings
from launch.stages import known_stages, require_inputs, stage_order, typed_stages, with_shapes
from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT
from recipes.core.processes import cores
from recipes.core.screen import plain_table
from recipes.core.stage_process import tail
from recipes.planning.chain import Chain, read_config_or_published
from recipes.planning.rules import refuse_errors
from recipes.planning.training_cost import stage_memory
from recipes.planning.transformer import FRAGMENTATION, Memory
from recipes.rehearsal.agreement import differences
from recipes.rehearsal.job import RankJob, RehearsalResult, jobs_of

KINDS = tuple(field.name for field in fields(Memory) if field.name != "reserved")
"""Types of tensors in memory, such as weights. ``reserved`` is memory without tensors."""
Results = list[tuple[RankJob, RehearsalResult]]
"""Each rehearsed rank of a stage with its result."""


def rehearse(cfg: DictConfig, settings: RunSettings, run_dir: Path, console: Console) -> None:
    """Rehearses the stages that compute on a device; shows their memory and the planned memory.

    With ``dry_run``, only lists the ranks. Raises ``RecipeError`` if the rehearsal finds mistakes,
    or if there is nothing to rehearse.
    """
    ranks = _parse_ranks(settings.rehearse)
    configs = typed_stages(cfg)
    only = configs if settings.only is None else known_stages(settings.only, configs, "only")
    selected = [name for name in configs if name in only]
    chain = chain_of(cfg, settings.hf_path, configs, run_dir)
    chain = with_shapes(chain, stage_order(configs))
    forced_and_accepted(settings, configs)  # this and the next call only refuse invalid settings
    planned_gates(settings, chain)
    stages = {name: stage_of(config) for name, config in configs.items()}
    for name in selected:
        require_inputs(name, configs[name], stages)
    problems = (p for name in selected for p in stages[name].problems(configs[name], chain))
    refuse_errors(problems, settings.skip_rules)
    hf_config, _ = read_config_or_published(chain.hf_path)
    jobs = jobs_of(chain, stages, selected, hf_config, ranks)
    if not jobs:
        with_rank = "" if ranks is None else f" with rank {' or '.join(map(str, ranks))}"
        raise RecipeError(
            f"there is nothing to rehearse: no selected stage{with_rank} computes on a device.",
            "use rehearse=true without only",
        )
    if settings.dry_run:
        for job in jobs:
            console.print(f"would rehearse {job.name}, rank {job.rank} of {job.world}")
        return
    results = _rehearse_all(jobs, console)
    console.print(_table(results, chain))
    mistakes = [*communication_mistakes(results), *memory_mistakes(results, chain)]
    for mistake in mistakes:
        console.print(mistake, markup=False, style="red")
    num_mistakes = sum(result.error is not None for _, result in results) + len(mistakes)
    if num_mistakes:
        raise RecipeError(
            f"the rehearsal found {num_mistakes} mistake(s); see above.",
            "if memory is too small, lower micro_batch_size or split the model over more ranks; "
            "other mistakes would also occur on the device",
        )


def _rehearse_all(jobs: Sequence[RankJob], console: Console) -> Results:
    """Rehearses all jobs (one rank each); prints a line for each job, and equal errors once."""
    num_processes = min(cores(), len(jobs))
    console.print(f"{len(jobs)} ranks, {num_processes} at once", highlight=False)
    results: Results = []
    first_jobs: dict[str, str] = {}  # the first job that failed with each error
    for job, result in zip(jobs, _run_worker(jobs, num_processes), strict=True):
        results.append((job, result))
        label = f"{len(results)}/{len(jobs)} {job.name}, rank {job.rank} of {job.world}"
        outcome = f"{'failed' if result.error else 'done'} in {result.seconds:.0f} s"
        if result.host and not result.error:
            outcome += f", {result.host / 1e9:.1f} GB of the host's memory"
        if result.error in first_jobs:
            outcome += f", with the same error as {first_jobs[result.error]}"
        console.print(f"{label}: {outcome}")
        if result.error and result.error not in first_jobs:
            console.print(result.error, markup=False, style="red")
            first_jobs[result.error] = f"{job.name}, rank {job.rank}"
    return results


def _parse_ranks(value: object) -> list[int] | None:
    """Returns the ranks that the setting ``rehearse`` lists; ``None`` for ``rehearse=true``."""
    if value is True:  # ``jobs_of`` chooses the ranks
        return None
    ranks = list(value) if isinstance(value, (list, ListConfig)) else [value]
    if not all(type(rank) is int and rank >= 0 for rank in ranks):  # isinstance(True, int) is True
        raise RecipeError(
            f"invalid rehearse={value}: must be true or a list of ranks (integers of at least 0).",
            "rehearse=true, or 'rehearse=[0,767]'",
        )
    return ranks


def _run_worker(jobs: Sequence[RankJob], num_processes: int) -> Iterator[RehearsalResult]:
    """Yields each job's result in order; raises ``RecipeError`` if the worker ends too early.

    The worker is a new process, because a rehearsal patches libraries.
    """
    from pydantic import TypeAdapter  # slow to import

    with tempfile.TemporaryDirectory() as temporary:
        file, log = Path(temporary) / "jobs.json", Path(temporary) / "log"
        file.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
        command = [sys.executable, "-m", "recipes.rehearsal.worker", str(file), f"{num_processes}"]
        with (
            log.open("w") as errors,
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
            ) as worker,
        ):
            assert worker.stdout is not None
            num_results = 0
            for line in worker.stdout:
                num_results += 1
                yield TypeAdapter(RehearsalResult).validate_json(line)
        if num_results < len(jobs):
            log_end = "\n".join(tail(log, 10))
            raise RecipeError(
                f"the rehearsal ended early:\n{log_end}",
                "if it was killed, free memory on this machine, or rehearse fewer ranks: "
                "'rehearse=[0]'",
            )


def communication_mistakes(results: Results) -> Iterator[str]:
    """Yields each mismatch in communication between ranks of a stage; ignores failed ranks."""
    for name in dict.fromkeys(job.name for job, _ in results):
        channels = {  # each rank's collectives and point-to-point messages
            job.rank: result.channels
            for job, result in results
            if job.name == name and result.error is None
        }
        yield from (f"{name}: {difference}" for difference in differences(channels))


def memory_mistakes(results: Results, chain: Chain) -> Iterator[str]:
    """Yields a message for each rank whose peak exceeds the memory of its GPU."""
    hardware = chain.hardware
    for job, result in results:
        # The process of a search and the training that it starts have a CUDA context each.
        num_contexts = 1 if job.search is None else 2
        tensors = sum(result.peak.values()) * FRAGMENTATION
        needed = tensors + num_contexts * hardware.reserved_bytes
        available = hardware.memory_of_rank(job.devices)
        search_gb = result.peak.get("parent", 0) / 1e9
        detail = f" ({search_gb:.1f} GB of this in the search's own process)" if search_gb else ""
        if hardware.on_gpu and needed > available:
            yield (
                f"{job.name}: rank {job.rank} takes {needed / 1e9:.1f} GB at its peak{detail}, but "
                f"a {hardware.name} has {available / 1e9:.1f} GB"
            )


def _table(results: Results, chain: Chain) -> Table:
    """Returns a table of rehearsed and planned memory, with a row for each rank that succeeded."""
    title = "Memory at the peak, GB: rehearsed / planned"
    table = plain_table(title, "stage", "rank", *KINDS, "total", "difference")
    for job, result in results:
        if result.error:
            continue
        planned = planned_memory(job, chain)
        peak = peak_by_kind(result, planned)
        # A cell is "rehearsed", or "rehearsed / planned" if the stage has planned memory.
        rehearsed_bytes = [*peak.values(), sum(peak.values())]
        cells, difference = [f"{size / 1e9:.2f}" for size in rehearsed_bytes], ""
        if planned is not None:
            planned_bytes = [getattr(planned, kind) for kind in KINDS]
            planned_bytes.append(sum(planned_bytes))
            pairs = zip(cells, planned_bytes, strict=True)
            cells = [f"{cell} / {size / 1e9:.2f}" for cell, size in pairs]
            difference = f"{rehearsed_bytes[-1] / planned_bytes[-1] - 1:+.0%}"
        table.add_row(*map(escape, (job.name, f"{job.rank}", *cells, difference)))
    return table


def peak_by_kind(result: RehearsalResult, planned: Memory | None) -> dict[str, int]:
    """Maps each of ``KINDS`` to its bytes at the peak, without those of a search's own process."""
    peak = {kind: result.peak.get(kind, 0) for kind in KINDS}
    if planned and planned.teacher and not planned.weights:
        # The plan counts a model that is not trained as ``teacher``, the rehearsal as ``weights``.
        peak["teacher"], peak["weights"] = peak["weights"], 0
    return peak


def planned_memory(job: RankJob, chain: Chain) -> Memory | None:
    """Returns the planned memory of a rank; ``None`` for stages without a cost estimate."""
    stage = load_stage(job.stage)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(stage.config), job.config))
    # A rehearsal runs the code for GPUs even if the recipe is for a CPU.
    chain = replace(chain, hardware=replace(chain.hardware, kind="gpu"))
    if (cost := stage.inference_cost(config, chain)) is not None:
        return cost.memory
    if stage.workload is None:
        return None
    workload = stage.workload(config, chain)
    if (student := job.inputs.get("student")) is not None:
        # The training of a search has no student in its config. The rehearsed student is the
        # largest candidate of the search.
        workload = replace(workload, trained=Architecture(**student.shape))
    # In Megatron's order of ranks, the ranks of a pipeline stage are consecutive.
    ranks_per_stage = job.world // workload.layout.pipeline
    return stage_memory(workload, chain.hardware, job.rank // ranks_per_stage)
