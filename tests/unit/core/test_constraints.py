"""Tests each type of constraint, and that every numeric setting has a constraint."""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Any

import pytest

from launch.executors.docker import DockerConfig
from launch.executors.slurm import SlurmConfig
from launch.planned import load_stage, stage_names
from launch.settings import RunSettings
from recipes.core.constraints import violations
from recipes.core.stage import Resources
from recipes.data.settings import PrepareDataConfig
from recipes.distillation.settings import DistillConfig
from recipes.engines.settings import BuildEngineConfig, MeasureSpeedConfig
from recipes.evaluation.settings import EvaluateTasksConfig
from recipes.planning.hardware import Hardware
from recipes.pruning.settings import PruneConfig
from recipes.search.settings import (
    EnumerateShapesConfig,
    SuccessiveHalvingConfig,
)
from recipes.search.space import Budget

NAN, INFINITE = float("nan"), float("inf")
LARGE = 10**20
"""Above the upper limit of every integer setting, and above 64 bits."""


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DistillConfig(lr=0.0), "lr=0.0: must be greater than 0"),
        (DistillConfig(max_steps=0), "max_steps=0: must be 1 or more"),
        (DistillConfig(clip_grad=NAN), "must be finite"),
        (DistillConfig(kd_weight=INFINITE), "must be finite"),
        (DistillConfig(lm_weight=-1.0), "must be 0 or more"),
        (DistillConfig(jsd_beta=1.0), "must be 0.999999 or less"),
        (DistillConfig(temperature=0.0), "must be 0.01 or more"),
        (DistillConfig(adam_beta2=1.0), "must be less than 1"),
        (DistillConfig(seed=-1), "must be 0 or more"),
        (DistillConfig(precision="fp8"), "must be one of: bf16-mixed, 32"),
        (DistillConfig(logits_loss="forward_k"), "Did you mean 'forward_kl'?"),
        (DistillConfig(fp8="e4m3"), "must be one of: hybrid"),
        (DistillConfig(intermediate_layer_pairs=[[0, 1]]), "intermediate_layer_pairs[0][0]=0"),
        (DistillConfig(resources=Resources(nodes=0)), "resources.nodes=0"),
        (DistillConfig(resources=Resources(env={"A B": "c"})), "the name of an environment"),
        *(
            (DistillConfig(resources=Resources(env={name: "1"})), f"env.{name}={name}: must be the")
            for name in ("RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "STAGE_DEADLINE")
        ),
        (SlurmConfig(pass_env=["SLURM_JOB_ID"]), "neither the launcher nor torchrun nor Slurm"),
        (DistillConfig(resources=Resources(sbatch=["-1"])), "sbatch[0]=-1"),
        (PrepareDataConfig(heldout_fraction=NAN), "heldout_fraction=nan"),
        (PrepareDataConfig(document_end="0.5"), "document_end=0.5: must be a special token"),
        (PruneConfig(target_hidden_size=-64), "target_hidden_size=-64: must be an integer"),
        (PruneConfig(target_hidden_size=1.5), "1 or more, or a fraction below 1"),
        (EvaluateTasksConfig(tasks=[]), "must not be empty"),
        (EvaluateTasksConfig(tasks=["sciq"], limit=1), "must be 2 or more"),
        (EvaluateTasksConfig(tasks=["sciq"], num_fewshot={"sciq": -1}), "num_fewshot.sciq=-1"),
        (BuildEngineConfig(max_batch_size=LARGE), "must be 2147483647 or less"),
        (MeasureSpeedConfig(threads=LARGE), "must be 4096 or less"),
        (EnumerateShapesConfig(hf_path="x", budget=Budget(parameters=-1)), "budget.parameters=-1"),
        (SuccessiveHalvingConfig(distill=DistillConfig(lr=-1.0)), "distill.lr=-1.0"),
        (Hardware(bytes_per_second=0.5), "must be 1e+06 or more"),
        (Hardware(memory_bytes=NAN), "memory_bytes=nan"),
        (SlurmConfig(time="1e-300"), "must be HH:MM:SS"),
        (SlurmConfig(time="0-00:00:00"), "above zero"),
        (RunSettings(skip_rules=["schedul"]), "Did you mean 'schedule'?"),
        (DockerConfig(options=["host"]), "must be an option of docker run"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_error_shows_the_invalid_value_and_its_requirement(config: Any, expected: str) -> None:
    config.stage = "x"  # required in a stage's config, ignored in others
    [message] = violations(config, "where")
    assert message.startswith("invalid where.")
    assert expected in message


@pytest.mark.parametrize(
    ("config_class", "field", "requirement"),
    [
        (DistillConfig, "intermediate_layer_pairs", "must be a list, such as [a,b]"),
        (EvaluateTasksConfig, "num_fewshot", "must be a mapping, such as {a: 1}"),
        (DistillConfig, "precision", "must be a string"),
    ],
)
def test_error_shows_a_value_of_the_wrong_type(
    config_class: Any, field: str, requirement: str
) -> None:
    settings = config_class(stage="x")
    setattr(settings, field, 5)  # a number has the wrong type for all of these fields
    assert f"invalid {field}=5: {requirement}" in list(violations(settings))


def test_users_may_set_other_variables() -> None:
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "SLURM_CPU_BIND", "RANKS")
    env = dict.fromkeys(names, "1")
    assert not list(violations(DistillConfig(stage="x", resources=Resources(env=env))))


def test_infinite_memory_is_valid() -> None:
    """Infinite means unknown: a login node does not know the memory of the jobs' nodes."""
    assert not list(violations(Hardware(memory_bytes=INFINITE)))


def unconstrained_numbers(config: type) -> list[str]:
    """Returns the names of numeric fields without a constraint, in a config and nested configs."""
    names = []
    for name, hint in typing.get_type_hints(config, include_extras=True).items():
        # The types in ``int | None`` are examined, those in ``Annotated[int, CONSTRAINT]`` are not.
        is_constrained = typing.get_origin(hint) is Annotated
        types = {hint} if is_constrained else {hint, *typing.get_args(hint)}
        if types & {int, float}:
            names.append(name)
        for nested in types:
            if isinstance(nested, type) and dataclasses.is_dataclass(nested):
                names += [f"{name}.{field}" for field in unconstrained_numbers(nested)]
    return names


@pytest.mark.parametrize(
    "config", [*(load_stage(name).config for name in stage_names()), Hardware, SlurmConfig]
)
def test_every_number_has_a_constraint(config: type) -> None:
    assert unconstrained_numbers(config) == []
