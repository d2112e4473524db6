"""Checks of ``prune``: scores and searches that do not fit the model, in this or another run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from nemo_convert.architecture import Architecture
from recipes.core.manifest import write_manifest
from recipes.core.stage import StageConfig
from recipes.planning.chain import Chain
from recipes.pruning.settings import PruneConfig, ScoreConfig
from recipes.search.settings import EnumerateShapesConfig
from recipes.search.space import Budget, Space
from recipes.stages import enumerate_shapes, prune
from tests.support.manifests import bare_manifest

Config = TypeVar("Config", bound=StageConfig)


def named(name: str, cfg: Config) -> Config:
    cfg.name = name
    return cfg


def problems(cfg: PruneConfig, chain: Chain) -> list[str]:
    return [f"{problem.what}: {problem.fix}" for problem in prune.check(cfg, chain)]


@pytest.mark.parametrize(("scored", "is_refused"), [("prune", False), ("import_hf", True)])
def test_scores_are_of_the_model_that_is_pruned(
    teacher: Architecture, scored: str, is_refused: bool
) -> None:
    """A pruned model is pruned once more."""
    inputs = {"checkpoint": "prune", "importance": "score"}
    cfg = named("prune2", PruneConfig(inputs=inputs, target_num_layers=2))
    score = named("score", ScoreConfig(inputs={"checkpoint": scored}, block_sizes=[1]))
    stages = {"prune": named("prune", PruneConfig()), "score": score, "prune2": cfg}
    chain = Chain("t", teacher, stages, shapes={"prune": [replace(teacher, num_layers=3)]})
    messages = [
        text for text in problems(cfg, chain) if "prune2 prunes prune, but score scored" in text
    ]
    assert len(messages) == is_refused
    assert all("inputs.checkpoint=prune" in text for text in messages)


@pytest.mark.parametrize(("method", "is_refused"), [("loss", False), ("block", True)])
def test_layers_are_chosen_as_by_the_search_of_another_run(
    teacher: Architecture, tmp_path: Path, method: str, is_refused: bool
) -> None:
    winner = replace(teacher, num_layers=3)
    for name, config in (
        ("rank_candidates", {"layer_importance": "loss"}),
        ("successive_halving", {"inputs": {"candidates": "rank_candidates"}}),
    ):
        (tmp_path / name).mkdir()
        manifest = bare_manifest(name, "search_results", None)
        manifest = replace(manifest, config=config, architecture=winner.as_dict())
        write_manifest(tmp_path / name, manifest)
    inputs = {"checkpoint": "import_hf", "shape": str(tmp_path / "successive_halving")}
    cfg = named("prune", PruneConfig(inputs=inputs, layer_importance=method))
    messages = [
        text
        for text in problems(cfg, Chain("t", teacher, {"prune": cfg}))
        if "which ranked" in text
    ]
    assert len(messages) == is_refused
    assert all("set stages.prune.layer_importance=loss" in text for text in messages)


def test_a_search_warns_of_shapes_that_transformers_5_refuses(teacher: Architecture) -> None:
    """The sizes are multiples of 8; the model has 6 heads."""
    model = replace(teacher, hf_architecture="LlamaForCausalLM", num_attention_heads=6)
    model = replace(model, num_query_groups=2, hidden_size=96)

    def warnings(divisor: int) -> list[str]:
        space = Space(hidden_size_divisor=divisor, ffn_hidden_size_divisor=64)
        cfg = named("shapes", EnumerateShapesConfig(budget=Budget(parameters=0.9), space=space))
        checked = enumerate_shapes.check(cfg, Chain("t", model, {"shapes": cfg}))
        return [problem.fix for problem in checked if problem.rule.name == "transformers-5"]

    [fix] = warnings(8)
    assert "hidden_size_divisor=24" in fix
    assert not warnings(24)
