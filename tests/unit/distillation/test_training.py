"""What can be said of a training without torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from recipes.distillation.settings import CorrectTeacherConfig
from recipes.distillation.training import (
    CHECKPOINTS,
    steps_in,
    training_progress,
    whole_checkpoints,
)
from recipes.planning.chain import Chain
from recipes.planning.hardware import Hardware
from recipes.stages.correct_teacher import STAGE


def test_progress_is_the_last_whole_checkpoint(tmp_path: Path) -> None:
    assert training_progress(tmp_path) is None
    for name in ("step=9", "step=19-last", "step=29"):
        (tmp_path / CHECKPOINTS / name).mkdir(parents=True)
    (tmp_path / CHECKPOINTS / "step=29-unfinished").touch()  # NeMo's mark while it writes
    assert training_progress(tmp_path) == "step 20"
    assert {steps_in(path) for path in whole_checkpoints(tmp_path / CHECKPOINTS)} == {10, 20}


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"max_steps": 5}, "schedule"),
        ({"seq_length": 4096}, "seq-length"),
        ({"sequence_parallel": True, "tensor_model_parallel_size": 2}, "ranks"),
    ],
)
def test_rules_of_every_training(chain: Chain, fields: dict[str, float], rule: str) -> None:
    assert [p.rule.name for p in STAGE.problems(CorrectTeacherConfig(**fields), chain)] == [rule]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, []),
        ({"fp8_recipe": "delayed"}, ["scales all layers together"]),
        ({"fp8_recipe": "delayed", "first_last_layers_bf16": False}, []),
        ({"precision": "32"}, ["precision=32"]),
        ({"micro_batch_size": 1, "seq_length": 40}, ["a micro batch is 40"]),
    ],
)
def test_what_multiplies_in_fp8(chain: Chain, fields: dict[str, object], said: list[str]) -> None:
    on_gpu = replace(chain, hardware=Hardware("h100", "gpu", memory_bytes=80e9))
    found = list(STAGE.problems(CorrectTeacherConfig(fp8="hybrid", **fields), on_gpu))  # type: ignore[arg-type]
    assert {p.rule.name for p in found} == ({"fp8"} if said else set())
    assert len(found) == len(said)
    assert all(words in problem.what for words, problem in zip(said, found, strict=True))


def test_a_teacher_is_corrected_by_default(chain: Chain) -> None:
    assert list(STAGE.problems(CorrectTeacherConfig(), chain)) == []
