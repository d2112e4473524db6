"""Layers of the teacher are added to a student that lacks them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_convert import convert, nemo
from nemo_convert.hf import Weights
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT
from recipes.core.stage import Input
from recipes.data.token_sequences import TextSequences
from recipes.evaluation.results import AddLayersResult, EvaluationResult
from recipes.evaluation.text_quality import measure_checkpoints
from recipes.pruning.added_layers import (
    combine_weights,
    layers_by_size,
    layers_of_student,
    measure_sizes,
)
from recipes.pruning.kept import KeptIndices
from recipes.pruning.pruned_checkpoint import prune_weights, save_weights
from recipes.pruning.settings import AddLayersConfig
from recipes.stages.add_layers import _require_origin
from tests.support.in_process import run_successfully
from tests.support.manifests import bare_manifest
from tests.support.runs import DISTILL, manifest_of, settings, tiny

KEPT = [1, 4]
"""Layers that a student keeps, counted from 1; its teacher has four."""


@pytest.fixture(scope="module")
def teacher(even_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = tmp_path_factory.mktemp("teacher") / "teacher.nemo"
    convert.to_nemo(even_llama, checkpoint)
    return checkpoint


def save_pruned(teacher: Path, layers: list[int], out: Path) -> Path:
    """Saves the teacher with only ``layers`` as a checkpoint, without training; returns ``out``."""
    shape = nemo.architecture_of(teacher)
    weights = prune_weights(teacher, KeptIndices(layers, {}), shape.kv_channels)
    save_weights(teacher, replace(shape, num_layers=len(layers)), weights, out)
    return out


def test_each_size_adds_the_first_missing_layer() -> None:
    assert layers_by_size([1, 4, 6], 6) == [[1, 4, 6], [1, 2, 4, 6], [1, 2, 3, 4, 6]]


def test_layers_of_a_student_are_numbered_as_in_the_teacher() -> None:
    assert layers_of_student([1, 4, 6], range(1, 7)) == [1, 4, 6]
    # This teacher was pruned, too: its third layer is layer 6 of the unpruned model.
    assert layers_of_student([1, 6], [1, 4, 6]) == [1, 3]


@pytest.mark.parametrize("layers", [None, [1, 7]])
def test_student_layers_that_are_unknown_or_not_in_the_teacher_are_refused(
    layers: list[int] | None,
) -> None:
    with pytest.raises(RecipeError, match="not layers of the teacher"):
        layers_of_student(layers, range(1, 7))


def test_only_added_layers_have_the_weights_of_the_teacher(teacher: Path, tmp_path: Path) -> None:
    shape = nemo.architecture_of(teacher)
    weights = prune_weights(teacher, KeptIndices(KEPT, {}), shape.kv_channels)
    # Doubled weights represent the result of training.
    trained = {name: 2 * weight for name, weight in weights.items()}
    save_weights(teacher, replace(shape, num_layers=2), trained, tmp_path / "student.nemo")
    combined = combine_weights(tmp_path / "student.nemo", teacher, KEPT, [1, 2, 4])
    unchanged = prune_weights(teacher, KeptIndices([1, 2, 4], {}), shape.kv_channels)
    assert combined.keys() == unchanged.keys()
    for name, weight in unchanged.items():
        is_added = ".layers.1." in name  # layer 2, since names count layers from 0
        assert torch.equal(combined[name], weight if is_added else 2 * weight), name


def test_a_student_that_was_pruned_from_another_model_is_refused(tmp_path: Path) -> None:
    teacher = bare_manifest("import_hf", "checkpoint_nemo", None)
    student = bare_manifest("prune", "checkpoint_nemo", None)
    student.inputs = {"checkpoint": "another model"}
    inputs = {"student": Input(tmp_path, student), "teacher": Input(tmp_path, teacher)}
    with pytest.raises(RecipeError, match="was not pruned from"):
        _require_origin(inputs)
    student.inputs = {"checkpoint": teacher.fingerprint}
    _require_origin(inputs)


def test_sizes_have_the_quality_of_saved_models(teacher: Path, tmp_path: Path) -> None:
    """Compares models combined in memory with the same models saved as checkpoints."""
    # Four sequences of 32 random token ids. The vocabulary has 294 tokens.
    tokens = torch.randint(5, 290, (4, 32), generator=torch.Generator().manual_seed(1))
    text = TextSequences(tokens, torch.ones(4, 31, dtype=torch.bool), {"text": slice(0, 4)})
    checkpoints = [  # with 2 and 3 layers
        save_pruned(teacher, layers, tmp_path / f"{len(layers)}.nemo")
        for layers in layers_by_size(KEPT, 4)
    ]
    expected = measure_checkpoints(teacher, checkpoints, text, precision="32", micro_batch_size=2)
    steps: list[tuple[int, int]] = []
    cfg = AddLayersConfig(micro_batch_size=2)
    student = checkpoints[0]
    measured = measure_sizes(cfg, student, teacher, KEPT, text, lambda *step: steps.append(step))
    assert list(measured) == [2, 3]
    assert steps == [(1, 2), (2, 2)]
    for size, quality, checkpoint in zip(measured.values(), expected, checkpoints, strict=True):
        assert size.perplexity == pytest.approx(quality.perplexity, rel=1e-5)
        assert size.kl_to_teacher == pytest.approx(quality.kl_to_teacher, rel=1e-4)
        assert size.parameters == nemo.architecture_of(checkpoint).parameters()


def test_a_recipe_exports_a_size_between_student_and_teacher(
    even_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_successfully(
        "recipe=llama_depth_prune",
        "add_layers=teacher",
        "stages.add_layers.num_layers=3",
        *tiny(even_llama, text_file, run),
        *("tasks=null", "engine=null", "heal=least_squares"),
        *settings("score", num_calibration_samples=8, num_loss_samples=4),
        *settings("prune", target_num_layers=2),
        *settings("distill", **DISTILL),
        *settings("evaluate", num_sequences=8, new_tokens=8),
        cwd=tmp_path,
    )
    result = manifest_of(run, "add_layers").result(AddLayersResult)
    kept = manifest_of(run, "prune").metrics["kept_layers"]
    assert result.kept_layers == sorted({*kept, *result.added_layers})
    assert list(result.sizes) == [2, 3]
    evaluation = manifest_of(run, "evaluate").result(EvaluationResult)
    assert evaluation.distilled.parameters == result.sizes[3].parameters
    assert evaluation.distilled.loss == pytest.approx(result.sizes[3].loss, rel=1e-5)
    # The exported model has the added layer with the teacher's weights. Names count layers from 0.
    export = run / "export_hf" / ARTIFACT
    [added] = result.added_layers
    index = result.kept_layers.index(added)
    weight = Weights(export).read(f"model.layers.{index}.mlp.up_proj.weight")
    original = Weights(even_llama).read(f"model.layers.{added - 1}.mlp.up_proj.weight")
    # On a processor with fast bfloat16, training and the export are in bfloat16.
    assert torch.equal(weight, original.to(weight.dtype))
    card = (export / "README.md").read_text()
    [dropped] = {1, 2, 3, 4} - {*result.kept_layers}
    assert f"- Layers dropped, counted from 1: {dropped}.\n" in card
    assert f"from the teacher and without training: {added} " in card
    report = (run / "report" / ARTIFACT / "report.html").read_text()
    assert re.search(r'<th scope="row">3 <span class="tag">written</span>', report)
    assert 'id="plot-added-layers"' in report
    assert "tokens and added layers of the teacher." in report
    assert ">Added layers</th>" in report  # in the table of FLOPs
