"""Tests checks of ``prune`` and ``enumerate_shapes``: scores and shapes that do not fit a model."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError
from recipes.core.manifest import write_manifest
from recipes.core.stage import Input
from recipes.planning.chain import Chain
from recipes.pruning.settings import PruneConfig, ScoreConfig
from recipes.pruning.targets import searched_shape_problems
from recipes.search.results import LatencyFit, LatencyResult
from recipes.search.settings import EnumerateShapesConfig
from recipes.search.space import Budget, Space
from recipes.stages import enumerate_shapes, prune
from tests.support.folders import write_folder
from tests.support.manifests import bare_manifest
from tests.unit.conftest import LLAMA_CONFIG


def problems(cfg: PruneConfig, chain: Chain) -> list[str]:
    """Returns the problems of a stage as texts with their fixes."""
    return [f"{problem.what}: {problem.fix}" for problem in prune.check(cfg, chain)]


@pytest.mark.parametrize(("scored_stage", "is_refused"), [("prune", False), ("import_hf", True)])
def test_scores_of_another_model_are_refused(
    teacher: Architecture, scored_stage: str, is_refused: bool
) -> None:
    """``prune2`` prunes the model that ``prune`` pruned, so it needs the scores of that model."""
    inputs = {"checkpoint": "prune", "importance": "score"}
    cfg = PruneConfig("prune", inputs, target_num_layers=2)
    cfg.name = "prune2"
    score = ScoreConfig("score", {"checkpoint": scored_stage}, block_sizes=[1])
    stages = {"prune": PruneConfig("prune"), "score": score, "prune2": cfg}
    chain = Chain("t", teacher, stages, shapes={"prune": [replace(teacher, num_layers=3)]})
    messages = [
        text for text in problems(cfg, chain) if "prune2 prunes prune, but score scored" in text
    ]
    assert len(messages) == is_refused
    assert all("inputs.checkpoint=prune" in text for text in messages)


@pytest.mark.parametrize(("method", "is_refused"), [("loss", False), ("block", True)])
def test_layers_must_be_chosen_by_the_method_of_the_search(
    teacher: Architecture, tmp_path: Path, method: str, is_refused: bool
) -> None:
    """The search is in another run. Its ``rank_candidates`` has ``layer_importance=loss``."""
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
    cfg = PruneConfig("prune", inputs, layer_importance=method)
    messages = [
        text
        for text in problems(cfg, Chain("t", teacher, {"prune": cfg}))
        if "which ranked" in text
    ]
    assert len(messages) == is_refused
    assert all("set stages.prune.layer_importance=loss" in text for text in messages)


def test_a_search_warns_of_shapes_that_transformers_5_refuses(teacher: Architecture) -> None:
    """transformers 5 requires that a Llama's hidden size is a multiple of its heads, here 6.

    With a divisor of 8, the search has sizes that are not. 24 is a multiple of 8 and of 6.
    """
    model = replace(teacher, hf_architecture="LlamaForCausalLM", num_attention_heads=6)
    model = replace(model, num_query_groups=2, hidden_size=96)

    def warning_fixes(divisor: int) -> list[str]:
        space = Space(hidden_size_divisor=divisor, ffn_hidden_size_divisor=64)
        cfg = EnumerateShapesConfig("shapes", budget=Budget(parameters=0.9), space=space)
        all_problems = enumerate_shapes.check(cfg, Chain("t", model, {"shapes": cfg}))
        return [item.fix for item in all_problems if item.rule.name == "transformers-5"]

    [fix] = warning_fixes(8)
    assert "hidden_size_divisor=24" in fix
    assert not warning_fixes(24)
    # The search always has the teacher's hidden size, which fewer heads may not divide.
    fewer_heads = [replace(model, hidden_size=100, num_attention_heads=n) for n in (6, 4)]
    [problem] = searched_shape_problems("shapes", fewer_heads)
    assert "space.prune_heads=false" in problem.fix


@pytest.mark.parametrize("tokens_per_second", [1e-3, 1e9])
def test_only_the_run_judges_a_budget_by_measured_latency(
    tokens_per_second: float, teacher: Architecture, tmp_path: Path
) -> None:
    """The teacher meets the first limit. No shape meets the second one."""
    folder = tmp_path / "hf"
    write_folder(folder, LLAMA_CONFIG)
    cfg = EnumerateShapesConfig(
        hf_path=str(folder),
        space=Space(hidden_size_divisor=8, ffn_hidden_size_divisor=8),
        budget=Budget(tokens_per_second=tokens_per_second),
        inputs={"latency": "measure_latency"},
    )
    assert not list(enumerate_shapes.check(cfg, Chain("t", teacher, {})))
    cfg_without_latency = replace(cfg, inputs={})
    assert list(enumerate_shapes.check(cfg_without_latency, Chain("t", teacher, {})))
    fit = LatencyResult(LatencyFit(1.0, 0.1, 1.0), 1, "openvino", "fp32", [])
    manifest = bare_manifest("measure_latency", "latency_model", None)
    latency = Input(tmp_path, replace(manifest, metrics=asdict(fit)))
    expected = "the teacher is within" if tokens_per_second < 1 else "no architecture fits"
    with pytest.raises(RecipeError, match=f"{expected} the budget .* measured latency"):
        enumerate_shapes.run(cfg, {"latency": latency}, tmp_path)
