"""Ranks and settings of a rehearsal, which is a run on fake tensors.

These tests rehearse nothing; ``tests/cpu/rehearsal`` does.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import DictConfig
from pydantic import TypeAdapter

from launch.machine import chain_of
from launch.planned import stage_of
from launch.rehearse import memory_mistakes, planned_memory
from launch.stages import stage_order, typed_stages, with_shapes
from recipes.planning.chain import Chain, read_config_or_published
from recipes.rehearsal.agreement import distinct_ranks
from recipes.rehearsal.job import RankJob, RehearsalResult, jobs_of
from tests.unit.conftest import Compose, Launch

ChainAndJobs = tuple[Chain, list[RankJob]]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rehearse=soon", "invalid rehearse=soon: must be true or a list"),
        ("rehearse=[0,-1]", "invalid rehearse=[0, -1]: must be true or a list"),
        ("rehearse=[4]", "no selected stage with rank 4"),
        ("rehearse=true stages.distill.inputs.teacher=/tmp", "/tmp has no manifest.json"),
        ("rehearse=true +stages.distill.inputs.foo=prune", "no unknown inputs"),
        ("rehearse=true force=[distil]", "force: there is no stage 'distil'"),
        ('rehearse=true gates=["recoverd>1"]', "does not measure recoverd"),
    ],
)
def test_invalid_rehearsals_are_refused(launch: Launch, override: str, expected: str) -> None:
    process = launch("recipe=llama_depth_prune", *override.split())
    assert process.returncode == 1
    assert expected in process.stderr
    assert process.stderr.count("\n") <= 2, "more than the error and its fix"


def chain_and_jobs(cfg: DictConfig, run_dir: Path, ranks: list[int] | None = None) -> ChainAndJobs:
    """Returns a recipe's chain and the jobs of its rehearsal. ``ranks`` is as in ``jobs_of``."""
    configs = typed_stages(cfg)
    chain = chain_of(cfg, cfg.model.hf_path, configs, run_dir)
    chain = with_shapes(chain, stage_order(configs))
    stages = {name: stage_of(config) for name, config in configs.items()}
    hf_config, _ = read_config_or_published(chain.hf_path)
    return chain, jobs_of(chain, stages, list(stages), hf_config, ranks)


def test_distinct_ranks_are_the_first_replica_the_start_of_the_last_one_and_the_last_rank() -> None:
    # The arguments are the number of ranks, then the tensor, context, pipeline and expert sizes.
    assert distinct_ranks(1, 1, 1, 1, 1) == [0]
    assert distinct_ranks(8, 1, 1, 1, 1) == [0, 7]
    # 192 replicas of 4 ranks. The last replica has ranks 764 to 767.
    assert distinct_ranks(768, 4, 1, 1, 1) == [0, 1, 2, 3, 764, 767]
    # Pipeline stages have ranks 0 to 7 and 8 to 15. The first replica has 4 ranks in each of them.
    # Rank 4 is the first rank of the last replica.
    assert distinct_ranks(16, 2, 2, 2, 1) == [0, 1, 2, 3, 4, 8, 9, 10, 11, 15]
    # There is only one replica.
    assert distinct_ranks(16, 2, 1, 1, 8) == list(range(16))
    assert distinct_ranks(8, 2, 2, 2, 1) == list(range(8))


def test_a_rehearsal_runs_few_steps_at_full_shapes(compose: Compose, tmp_path: Path) -> None:
    overrides = ("recipe=qwen3_8b_depth", "stages.distill.profile_steps=[1,2]")
    chain, jobs = chain_and_jobs(compose(*overrides), tmp_path, [0, 767])
    assert [(job.name, job.rank) for job in jobs] == [
        ("import_hf", 0),
        ("score", 0),
        ("distill", 0),
        ("distill", 767),
        ("evaluate", 0),
        ("export_hf", 0),
        ("export_teacher", 0),
    ]
    distill, export = jobs[2], jobs[5]
    config = distill.config
    # 768 ranks with tensor-parallel size 4 are 192 replicas. The batch is 192 replicas × 2
    # sequences × 2 micro batches. There are 2 steps.
    assert (config["global_batch_size"], config["max_steps"]) == (768, 2)
    assert config["profile_steps"] == []
    assert (config["seq_length"], config["tensor_model_parallel_size"]) == (4096, 4)
    assert distill.vocabulary == 151936 // 4  # a shard of Qwen3's vocabulary
    assert distill.inputs["student"].shape == chain.shape_of("prune").as_dict()
    # The checkpoint to export comes from distill and has the pruned shape.
    assert export.inputs["checkpoint"].shape == chain.shape_of("prune").as_dict()
    assert [job.name for job in jobs if job.resumed] == ["distill", "distill"]
    assert TypeAdapter(RankJob).validate_json(json.dumps(asdict(distill))) == distill


def test_successive_halving_is_rehearsed_by_training_its_largest_candidate(
    compose: Compose, tmp_path: Path
) -> None:
    chain, jobs = chain_and_jobs(compose("recipe=qwen3_8b_search"), tmp_path)
    search_jobs = [job for job in jobs if job.name == "successive_halving"]
    # 8 ranks with tensor-parallel size 2. Ranks 0 and 1 are the first replica, 6 and 7 the last.
    assert [job.rank for job in search_jobs] == [0, 1, 6, 7]
    job = search_jobs[0]
    assert (job.stage, job.world) == ("distill", 8)
    assert job.inputs["teacher"].shape == chain.teacher.as_dict()
    largest = chain.shapes["enumerate_shapes"][0]
    assert job.inputs["student"].shape == largest.as_dict()
    memory = planned_memory(job, chain)
    assert memory is not None
    assert memory.weights == largest.parameters()  # 2 bytes per parameter, split over 2 ranks
    assert job.config["global_batch_size"] == 16  # 4 replicas × 2 sequences × 2 micro batches


def test_a_cached_teacher_has_the_settings_of_its_cache(compose: Compose, tmp_path: Path) -> None:
    overrides = ("recipe=qwen3_8b_depth", "teacher=cached", "stages.cache_logits.top_k=8")
    _, jobs = chain_and_jobs(compose(*overrides), tmp_path)
    job = next(job for job in jobs if job.name == "distill")
    teacher = job.inputs["teacher"]
    assert teacher.kind == "logit_cache"
    expected = {"seq_length": 4096, "top_k": 8, "tail_draws": 0, "temperature": 1.0}
    assert teacher.config == expected


def test_a_peak_above_the_devices_memory_is_a_mistake(compose: Compose, tmp_path: Path) -> None:
    chain, jobs = chain_and_jobs(compose("recipe=qwen3_8b_depth"), tmp_path)
    job = next(job for job in jobs if job.name == "evaluate")
    # The check adds 5% for fragmentation and 4 GB for the CUDA context: 1.05 × 81 + 4 = 89 GB.
    too_many_bytes = RehearsalResult(peak={"weights": 81_000_000_000})
    one_bf16_model = RehearsalResult(peak={"weights": 16_000_000_000})
    assert list(memory_mistakes([(job, one_bf16_model)], chain)) == []
    assert list(memory_mistakes([(job, too_many_bytes)], chain)) == [
        "evaluate: rank 0 takes 89.0 GB at its peak, but a h100 has 80.0 GB"
    ]
