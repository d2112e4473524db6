"""Runs every large recipe on a tiny model of its family, with other pruning targets and few tokens.

The ``_2.5b`` variants of recipes are not run. They differ from the recipes only in settings that
are replaced here, as tests/unit/test_recipes.py shows.
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
    path.stem
    for path in (CONF / "recipe").glob("*.yaml")
    # test_chain, test_search and test_long_context run the other recipes, and the last test here
    # runs "shrink".
    if not path.stem.endswith(("_prune", "_search", "_2.5b", "shrink", "mistral_nemo_12b_width"))
)
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
}
"""``model_type`` of a tiny model, by the Hugging Face architecture of the recipe's model."""
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
"""Pruning settings by the last word of a recipe's name: what the recipe prunes."""


def model_type_of(recipe: str) -> str:
    """Returns the ``model_type`` of a recipe's model."""
    model = recipe.rpartition("_")[0]
    hf_path = str(OmegaConf.load(CONF / "model" / f"{model}.yaml").hf_path)
    return MODEL_TYPES[CONFIGS[hf_path]["architectures"][0]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_on_a_tiny_model(recipe: str, tmp_path: Path, text_file: Path) -> None:
    targets = TARGETS[recipe.rpartition("_")[2]]
    model = write_tiny_model(tmp_path / "model", text_file, model_type_of(recipe), **EVEN)
    run_successfully(
        f"recipe={recipe}",
        *tiny(model, text_file, tmp_path / "run"),
        "hardware=cpu",
        "stages.prepare_data.processes=1",
        "tasks=null",  # test_chain and test_tasks run benchmarks
        "engine=null",  # TensorRT-LLM needs a GPU
        *settings("score", num_calibration_samples=16, **{"resources.devices": 2}),
        "stages.prune.drop_layers=[]",  # a recipe drops layers that the tiny model does not have
        *settings("prune", **targets),
        *settings("distill", **DISTILL),
        *settings("evaluate", num_sequences=8, new_tokens=8, **{"resources.devices": 2}),
        cwd=tmp_path,
    )
    plan, exported = (manifest_of(tmp_path / "run", stage) for stage in ("plan", "export_hf"))
    student = exported.architecture
    assert student is not None
    for name, value in targets.items():
        if name.startswith("target_"):
            assert student[name.removeprefix("target_")] == value
    [workload] = plan.config["workloads"].values()  # only ``distill`` trains
    assert workload["trained"] == student
    assert plan.metrics["summary"]["tokens"] == 4 * 4 * 64  # steps · batch size · sequence length


def test_shrink_trains_the_shape_that_its_search_chose(tmp_path: Path, text_file: Path) -> None:
    """The search chooses the shape. A later run with another budget reuses scores and data."""
    model = write_tiny_model(
        tmp_path / "model", text_file, model_type_of("qwen3_8b_search"), **EVEN
    )
    space = {"hidden_size_divisor": 16, "ffn_hidden_size_divisor": 32, "max_depth_pruning": 0.5}
    halving = {"num_candidates": 2, "max_tokens": 4096, "num_samples": 4}
    arguments = [
        "recipe=shrink",
        "budget.parameters=0.55",  # fraction of the teacher's parameters
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
    run_successfully(*arguments, cwd=tmp_path)
    run = tmp_path / "run"
    search, exported = (manifest_of(run, name) for name in ("successive_halving", "export_hf"))
    search_result = search.result(SearchResult)
    winner = search_result.chosen()
    assert winner is not None
    assert winner.shape == Architecture(**exported.architecture or {})
    trained = [candidate for candidate in search_result.candidates if candidate.tokens]
    assert len(trained) == halving["num_candidates"]
    recipe = OmegaConf.load(run / "successive_halving" / "artifact" / "recipe.yaml")
    assert winner.name in recipe.description
    page = (run / "report" / "artifact" / "report.html").read_text()
    assert all(candidate.name in page for candidate in search_result.candidates)
    assert 'id="plot-search"' in page
    assert "chosen by the search" in page
    # A later override replaces an earlier one.
    planned = run_successfully(*arguments, "budget.parameters=0.5", "dry_run=true", cwd=tmp_path)
    for stage, action in (("score", "skip"), ("prepare_data", "skip"), ("prune", "run")):
        assert re.search(rf"{stage} +{action}", planned.output), planned.output
