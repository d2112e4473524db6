"""Tests which inputs of other runs ``prune`` and ``heal`` refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_convert.hf_config import read_architecture
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT
from recipes.core.stage import Input
from recipes.pruning.kept import Importance, importance_of
from recipes.pruning.settings import LAYER_METHODS
from recipes.stages import heal, prune
from tests.support.manifests import bare_manifest
from tests.unit.conftest import LLAMA_CONFIG


def test_scores_of_another_run_must_fit_all_axes(tmp_path: Path) -> None:
    teacher = read_architecture(LLAMA_CONFIG, "teacher")
    layers = dict.fromkeys(range(1, teacher.num_layers + 1), 1.0)
    widths = {
        "hidden_size": torch.zeros(teacher.hidden_size),
        "layers.1.num_attention_heads": torch.zeros(teacher.num_attention_heads),
        "layers.1.ffn_hidden_size": torch.zeros(teacher.ffn_hidden_size),
    }
    scores = Importance(1.0, dict.fromkeys(LAYER_METHODS, layers), widths=widths)
    prune._require_scores_of(teacher, scores, tmp_path)
    for axis in ("hidden_size", "num_attention_heads", "ffn_hidden_size"):
        other = replace(teacher, **{axis: 2 * getattr(teacher, axis)})
        with pytest.raises(RecipeError, match=f"are of a model with {axis}="):
            prune._require_scores_of(other, scores, tmp_path)


def test_scores_of_another_run_must_be_of_the_model_to_prune(tmp_path: Path) -> None:
    (tmp_path / ARTIFACT).mkdir()
    layers = {"block_influence": {1: 0.5}}
    Importance(1.0, layers, widths={"hidden_size": torch.zeros(4)}).save(tmp_path / ARTIFACT)

    def inputs(run: str, **fields: dict[str, str]) -> dict[str, Input]:
        scores = replace(bare_manifest("score", "importance", None), **fields)
        model = replace(bare_manifest("import_hf", "checkpoint_nemo", None), fingerprint="model")
        model_dir = tmp_path.parent / run / "import_hf"
        return {"importance": Input(tmp_path, scores), "checkpoint": Input(model_dir, model)}

    content = inputs("other")["checkpoint"].manifest.content_hash()
    for accepted in (
        inputs("other", inputs={"checkpoint": "model"}),
        inputs("other", input_content={"checkpoint": content}),
        inputs(".", inputs={"checkpoint": "an earlier model"}),
    ):
        assert importance_of(accepted).layers == layers
    with pytest.raises(RecipeError, match="are of another model than"):
        importance_of(inputs("other", inputs={"checkpoint": "another model"}))


def test_healing_needs_the_model_that_was_pruned(tmp_path: Path) -> None:
    (tmp_path / ARTIFACT).mkdir()

    def inputs(origin: str) -> dict[str, Input]:
        pruned = replace(
            bare_manifest("prune", "checkpoint_nemo", None), inputs={"checkpoint": origin}
        )
        teacher = replace(
            bare_manifest("import_hf", "checkpoint_nemo", None), fingerprint="teacher"
        )
        other_run = tmp_path / "other" / "import_hf"
        return {"checkpoint": Input(tmp_path, pruned), "teacher": Input(other_run, teacher)}

    with pytest.raises(RecipeError, match="was not pruned from"):
        heal._require_pruned_from_teacher(inputs("teacher"))  # not a result of ``prune``
    (tmp_path / ARTIFACT / "kept.safetensors").touch()
    heal._require_pruned_from_teacher(inputs("teacher"))
    with pytest.raises(RecipeError, match="was not pruned from"):
        heal._require_pruned_from_teacher(inputs("another model"))
