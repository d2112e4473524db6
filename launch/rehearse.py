"""Rehearses a recipe's stages at full size on this machine: ``rehearse=true``, or ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.machine import chain_of
from launch.plan import known_stages, stage_order, typed_stages, with_shapes
from launch.planned import load_stage, stage_of
from launch.settings import RunSettings
from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT
from recipes.core.screen import plain_table
from recipes.planning.chain import Chain
from recipes.planning.problems import require_none
from recipes.planning.published_configs import read_config_or_published
from recipes.planning.training_cost import stage_memory
from recipes.planning.transformer import FRAGMENTATION, Memory
from recipes.rehearsal.job import RankJob, jobs_of
from recipes.rehearsal.results import RehearsalResult, mismatches

KINDS = tuple(part.name for part in fields(Memory) if part.name != "reserved")
Results = list[tuple[RankJob, RehearsalResult]]


def rehearse(cfg: DictConfig, settings: RunSettings, run_dir: Path, console: Console) -> None:
    """Rehearses stages that compute on a device, and shows their memory beside the plan's."""
    ranks = _ranks(settings.rehearse)
    configs = typed_stages(cfg)
    only = set(configs) if settings.only is None else settings.only
    wanted = [name for name in configs if name in known_stages(only, configs, "only")]
    chain = chain_of(cfg, settings.hf_path, configs, run_dir)
    chain = with_shapes(chain, stage_order(configs))
    stages = {name: stage_of(config) for name, config in configs.items()}
    problems = (p for name in wanted for p in stages[name].problems(configs[name], chain))
    require_none(problems, settings.skip_rules)
    hf_config, _ = read_config_or_published(chain.hf_path)
    jobs = jobs_of(chain, stages, wanted, hf_config, ranks)
    if not jobs:
        said = "any rank" if ranks is None else f"rank {' or '.join(map(str, ranks))}"
        raise RecipeError(
            f"there is nothing to rehearse: no stage computes on a device and has {said}.",
            "rehearse=true, and leave out only",
        )
    if settings.dry_run:
        for job in jobs:
            console.print(f"would rehearse {job.name}, rank {job.rank} of {job.world}")
        return
    results: Results = []
    for job, one in zip(jobs, _run(jobs), strict=True):
        state = "failed" if one.error else "done"
        console.print(f"{job.name}, rank {job.rank} of {job.world}: {state} in {one.seconds:.0f} s")
        if one.error:
            console.print(one.error, markup=False, style="red")
        results.append((job, one))
    console.print(_table(results, chain))
    mistakes = [*mismatches(results), *too_large(results, chain)]
    for mistake in mistakes:
        console.print(mistake, markup=False, style="red")
    failed = sum(one.error is not None for _, one in results) + len(mistakes)
    if failed:
        raise RecipeError(
            f"the rehearsal found {failed} mistake(s); see above.",
            "where memory is short, lower micro_batch_size or split the model over more ranks; any "
            "other would be made on the device, too",
        )


def _ranks(given: object) -> list[int] | None:
    """Ranks that were asked for; ``None`` for the usual ones."""
    if given is True:
        return None
    listed = list(given) if isinstance(given, (list, ListConfig)) else [given]
    if not all(type(rank) is int and rank >= 0 for rank in listed):
        raise RecipeError(
            f"rehearse={given} is not true, and no list of ranks.",
            "rehearse=true, or 'rehearse=[0,767]'",
        )
    return listed


def _run(jobs: Sequence[RankJob]) -> Iterator[RehearsalResult]:
    """Rehearses in another process, which is good for nothing else afterwards."""
    from pydantic import TypeAdapter  # slow to import

    parse: Callable[[str], RehearsalResult] = TypeAdapter(RehearsalResult).validate_json
    with tempfile.TemporaryDirectory() as temporary:
        file, log = Path(temporary) / "jobs.json", Path(temporary) / "log"
        file.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
        command = [sys.executable, "-m", "recipes.rehearsal.worker", str(file)]
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
            done = 0
            for line in worker.stdout:
                done += 1
                yield parse(line)
        if done < len(jobs):
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
            raise RecipeError(
                f"the rehearsal ended early:\n{tail}",
                "if it was killed, free memory of this machine, or rehearse fewer: 'rehearse=[0]'",
            )


def too_large(results: Results, chain: Chain) -> Iterator[str]:
    """Peaks that the devices, if they are known, have no room for."""
    hardware = chain.hardware
    for job, one in results:
        held = sum(one.peak.values()) * FRAGMENTATION + hardware.reserved_bytes
        room = hardware.memory_of_rank(job.devices)
        if hardware.on_gpu and held > room:
            yield (
                f"{job.name}: rank {job.rank} takes {held / 1e9:.1f} GB at its peak, but a "
                f"{hardware.name} has {room / 1e9:.1f} GB"
            )


def _table(results: Results, chain: Chain) -> Table:
    """Peak memory by kind: as rehearsed / as planned."""
    title = "Memory at the peak, GB: rehearsed / planned"
    table = plain_table(title, "stage", "rank", *KINDS, "total", "difference")
    for job, one in results:
        if one.error:
            continue
        plan = planned(job, chain)
        peak = by_kind(one, plan)
        if plan is None:
            cells = [f"{peak[kind] / 1e9:.2f}" for kind in KINDS]
            rest = [f"{sum(peak.values()) / 1e9:.2f}", ""]
        else:
            cells = [_both(peak[kind], getattr(plan, kind)) for kind in KINDS]
            total, thought = sum(peak.values()), sum(getattr(plan, kind) for kind in KINDS)
            rest = [_both(total, thought), f"{total / thought - 1:+.0%}"]
        row = [job.name, f"{job.rank}", *cells, *rest]
        table.add_row(*map(escape, row))
    return table


def by_kind(one: RehearsalResult, plan: Memory | None) -> dict[str, int]:
    """Bytes at the peak of every kind that a plan knows."""
    peak = {kind: one.peak.get(kind, 0) for kind in KINDS}
    if plan and plan.teacher and not plan.weights:  # a model that only reads is the teacher
        peak["teacher"], peak["weights"] = peak["weights"], 0
    return peak


def _both(rehearsed: float, plan: float) -> str:
    return f"{rehearsed / 1e9:.2f} / {plan / 1e9:.2f}"


def planned(job: RankJob, chain: Chain) -> Memory | None:
    """What the planner says of a job's pipeline stage; ``None`` where it has no model of it."""
    spec = load_stage(job.stage)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(spec.config), job.config))
    chain = replace(chain, hardware=replace(chain.hardware, kind="gpu"))
    if spec.inference_cost is not None:
        return spec.inference_cost(config, chain).memory
    if spec.workload is None:
        return None
    workload = spec.workload(config, chain)
    if (student := job.inputs.get("student")) is not None:  # a halving's is no stage's
        workload = replace(workload, trained=Architecture(**student.shape))
    stage = job.rank // (job.world // workload.layout.pipeline)
    return stage_memory(workload, chain.hardware, stage)
