"""Runs every large recipe on a tiny model of its family, with other pruning targets and few tokens.

The ``_2.5b`` variants of recipes are not run: as tests/unit/test_recipes.py shows, they differ from
the recipes only in settings that are replaced here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.schema import CONF
from nemo_convert.architecture import Architecture
from recipes.planning.chain import CONFIGS
from recipes.search.results import SearchResult
from tests.support.in_process import run_successfully
from tests.support.models import EVEN, write_tiny_model
from tests.support.runs import DISTILL, manifest_of, settings, tiny

RECIPES = sorted(
    p.stem
    for p in (CONF / "recipe").glob("*.yaml")
    # test_chain and test_search run the recipes for small models; "_2.5b": see above.
    if not p.stem.endswith(("_prune", "_search", "_2.5b", "shrink"))
)
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen3ForCausalLM": "qwen3",
}
TARGETS = {
    "width": {
        "target_hidden_size": 48,
        "hidden_size_divisor": 8,
        "target_ffn_hidden_size": 96,
        "ffn_hidden_size_divisor": 8,
    },
    "depth": {"target_num_layers": 3},
}
TARGETS["nas"] = TARGETS["width"] | TARGETS["depth"]


def family_of(recipe: str) -> str:
    model = recipe.rpartition("_")[0]
    hf_path = str(OmegaConf.load(CONF / "model" / f"{model}.yaml").hf_path)
    return FAMILIES[CONFIGS[hf_path]["architectures"][0]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_on_a_tiny_model(recipe: str, tmp_path: Path, text_file: Path) -> None:
    kind = recipe.rpartition("_")[2]
    model = write_tiny_model(tmp_path / "model", text_file, family_of(recipe), **EVEN)
    run_successfully(
        f"recipe={recipe}",
        *tiny(model, text_file, tmp_path / "run"),
        "hardware=cpu",
        "stages.prepare_data.processes=1",
        "tasks=null",  # test_chain and test_tasks run benchmarks
        "engine=null",  # TensorRT-LLM needs a GPU
        *settings("score", num_calibration_samples=64, **{"resources.devices": 2}),
        "stages.prune.drop_layers=[]",  # a recipe drops layers that the tiny model does not have
        *settings("prune", **TARGETS[kind]),
        *settings("distill", **DISTILL),
        *settings("evaluate", num_sequences=8, new_tokens=8, **{"resources.devices": 2}),
        cwd=tmp_path,
    )
    plan, exported = (manifest_of(tmp_path / "run", stage) for stage in ("plan", "export_hf"))
    shape = exported.architecture
    assert shape is not None
    for name, value in TARGETS[kind].items():
        if name.startswith("target_"):
            assert shape[name.removeprefix("target_")] == value
    [planned] = [workload["trained"] for workload in plan.config["workloads"].values()]
    assert planned == shape
    assert plan.metrics["summary"]["tokens"] == 4 * 4 * 64  # steps · batch size · sequence length


def test_shrink_trains_a_model_within_its_budget(tmp_path: Path, text_file: Path) -> None:
    """A search chooses a shape within the budget. Another budget reuses scores and data."""
    model = write_tiny_model(tmp_path / "model", text_file, family_of("qwen3_8b_search"), **EVEN)
    space = {"hidden_size_divisor": 16, "ffn_hidden_size_divisor": 32, "max_depth_pruning": 0.5}
    halving = {"num_candidates": 2, "max_tokens": 4096, "num_samples": 4}
    arguments = [
        "recipe=shrink",
        "budget.parameters=0.55",
        "tasks=null",
        "engine=null",  # test_chain builds and times engines
        *tiny(model, text_file, tmp_path / "run"),
        *settings("enumerate_shapes.space", **space),
        *settings("score", num_calibration_samples=8, num_loss_samples=4),
        *settings("rank_candidates", num_samples=4),
        *settings("successive_halving", **halving),
        *settings("distill", **DISTILL),
        *settings("evaluate", num_sequences=8, new_tokens=8),
    ]
    done = run_successfully(*arguments, cwd=tmp_path)
    run = tmp_path / "run"
    search, exported = (manifest_of(run, name) for name in ("successive_halving", "export_hf"))
    search_result = search.result(SearchResult)
    winner = search_result.chosen()
    assert winner is not None
    assert winner.shape == Architecture(**exported.architecture or {})
    assert sum(bool(candidate.tokens) for candidate in search_result.candidates) == 2
    recipe = OmegaConf.load(run / "successive_halving" / "artifact" / "recipe.yaml")
    assert winner.name in recipe.description
    page = (run / "report" / "artifact" / "report.html").read_text()
    assert all(candidate.name in page for candidate in search_result.candidates)
    assert 'id="plot-search"' in page
    assert "chosen by the search" in page
    done = run_successfully(*arguments, "budget.parameters=0.5", "dry_run=true", cwd=tmp_path)
    for stage, action in (("score", "skip"), ("prepare_data", "skip"), ("prune", "run")):
        assert re.search(rf"{stage} +{action}", done.output), done.output
