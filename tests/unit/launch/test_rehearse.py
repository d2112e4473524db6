"""Ranks and settings of a rehearsal, a run on fake tensors. ``tests/cpu/rehearsal`` rehearses."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import DictConfig
from pydantic import TypeAdapter

from launch.machine import chain_of
from launch.plan import stage_order, typed_stages, with_shapes
from launch.planned import stage_of
from launch.rehearse import memory_mistakes, planned_memory
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
    ],
)
def test_invalid_rehearsals_are_refused(launch: Launch, override: str, expected: str) -> None:
    done = launch("recipe=llama_depth_prune", override)
    assert done.returncode == 1
    assert expected in done.stderr
    assert done.stderr.count("\n") <= 2


def chain_and_jobs(cfg: DictConfig, run_dir: Path, ranks: list[int] | None = None) -> ChainAndJobs:
    """Returns a recipe's chain and the jobs of its rehearsal."""
    configs = typed_stages(cfg)
    chain = chain_of(cfg, cfg.model.hf_path, configs, run_dir)
    chain = with_shapes(chain, stage_order(configs))
    stages = {name: stage_of(config) for name, config in configs.items()}
    hf_config, _ = read_config_or_published(chain.hf_path)
    return chain, jobs_of(chain, stages, list(stages), hf_config, ranks)


def test_one_data_parallel_replica_and_at_most_two_other_ranks_are_rehearsed() -> None:
    # The arguments are the number of ranks, then the tensor, context, pipeline and expert sizes.
    assert distinct_ranks(1, 1, 1, 1, 1) == [0]
    assert distinct_ranks(8, 1, 1, 1, 1) == [0, 7]
    assert distinct_ranks(768, 4, 1, 1, 1) == [0, 1, 2, 3, 764, 767]
    assert distinct_ranks(16, 2, 2, 2, 1) == [0, 1, 2, 3, 4, 8, 9, 10, 11, 15]
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
    config = jobs[2].config
    # The batch is 192 replicas × 2 sequences × 2 micro batches. There are 2 steps.
    assert (config["global_batch_size"], config["max_steps"]) == (768, 2)
    assert config["profile_steps"] == []
    assert (config["seq_length"], config["tensor_model_parallel_size"]) == (4096, 4)
    assert jobs[2].vocabulary == 151936 // 4
    assert jobs[2].inputs["student"].shape == chain.shape_of("prune").as_dict()
    # The checkpoint to export comes from distill and has the pruned shape.
    assert jobs[5].inputs["checkpoint"].shape == chain.shape_of("prune").as_dict()
    assert [job.resumed for job in jobs] == [False, False, True, True, False, False, False]
    assert TypeAdapter(RankJob).validate_json(json.dumps(asdict(jobs[2]))) == jobs[2]


def test_successive_halving_is_rehearsed_by_training_its_largest_candidate(
    compose: Compose, tmp_path: Path
) -> None:
    chain, jobs = chain_and_jobs(compose("recipe=qwen3_8b_search"), tmp_path)
    job, *others = (job for job in jobs if job.name == "successive_halving")
    # Rank 1 has the other tensor-parallel index. Rank 6 is the first rank of the last replica, and
    # rank 7 the last rank.
    assert [other.rank for other in others] == [1, 6, 7]
    assert (job.stage, job.world) == ("distill", 8)
    assert job.inputs["teacher"].shape == chain.teacher.as_dict()
    largest = chain.shapes["enumerate_shapes"][0]
    assert job.inputs["student"].shape == largest.as_dict()
    memory = planned_memory(job, chain)
    assert memory is not None
    assert memory.weights == largest.parameters()  # 2 bytes per parameter, split over 2 ranks
    assert job.config["global_batch_size"] == 16  # 4 replicas × 2 sequences × 2 micro batches


def test_a_cached_teacher_has_settings_of_cache_logits(compose: Compose, tmp_path: Path) -> None:
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
    # The check adds 5% for fragmentation and 4 GB for the CUDA context: 81 GB become 89 GB.
    too_many_bytes = RehearsalResult(peak={"weights": 81_000_000_000})
    one_bf16_model = RehearsalResult(peak={"weights": 16_000_000_000})
    assert list(memory_mistakes([(job, one_bf16_model)], chain)) == []
    assert list(memory_mistakes([(job, too_many_bytes)], chain)) == [
        "evaluate: rank 0 takes 89.0 GB at its peak, but a h100 has 80.0 GB"
    ]
