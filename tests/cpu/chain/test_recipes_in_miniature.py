"""Every large recipe as it is, on a tiny model of its family; targets, budget and paths differ.

A recipe of a small budget is its whole one but for what is replaced here: see
tests/unit/test_recipes.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.schema import CONF
from recipes.planning.published_configs import CONFIGS
from tests.support.in_process import run_here
from tests.support.miniatures import DISTILL
from tests.support.models import EVEN, write_tiny_model
from tests.support.runs import manifest_of, settings, tiny

RECIPES = sorted(
    p.stem
    for p in (CONF / "recipe").glob("*.yaml")
    # test_chain and test_search run the first two; the small budgets see above
    if not p.stem.endswith(("_prune", "_search", "_small"))
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
    done = run_here(
        f"recipe={recipe}",
        *tiny(model, text_file, tmp_path / "run"),
        "hardware=cpu",
        "stages.prepare_data.processes=1",
        *settings("prune", **TARGETS[kind]),
        *settings("distill", **DISTILL),
        *settings("evaluate", num_windows=8, new_tokens=8),
        cwd=tmp_path,
    )
    assert done.code == 0, done.output
    plan, exported = (manifest_of(tmp_path / "run", stage) for stage in ("plan", "export_hf"))
    shape = exported.architecture
    assert shape is not None
    for name, value in TARGETS[kind].items():
        if name.startswith("target_"):
            assert shape[name.removeprefix("target_")] == value
    [planned] = [workload["trained"] for workload in plan.config["workloads"].values()]
    assert planned == shape
    assert plan.metrics["figures"]["tokens"] == 4 * 4 * 64


def test_search_runs_on_a_tiny_model(tmp_path: Path, text_file: Path) -> None:
    """From the shapes within a budget to the report and the winner's recipe."""
    model = write_tiny_model(tmp_path / "model", text_file, family_of("qwen3_8b_search"), **EVEN)
    smaller = {"hidden_size_divisor": 16, "ffn_hidden_size_divisor": 32}
    training = {"global_batch_size": 4, "tensor_model_parallel_size": 1, "resources.devices": 1}
    done = run_here(
        "recipe=qwen3_8b_search",
        *tiny(model, text_file, tmp_path / "run"),
        "hardware=cpu",
        "stages.prepare_data.processes=1",
        "stages.enumerate_shapes.budget={parameters: 0.75}",
        *settings("enumerate_shapes.space", **smaller, tensor_model_parallel_size=1),
        *settings("rank_candidates", num_samples=4),
        *settings("successive_halving", num_candidates=2, max_tokens=4096, num_samples=4),
        *settings("successive_halving.distill", **training),
        cwd=tmp_path,
    )
    assert done.code == 0, done.output
    found = manifest_of(tmp_path / "run", "successive_halving")
    assert sum(bool(one["tokens"]) for one in found.metrics["candidates"]) == 2
    recipe = OmegaConf.load(tmp_path / "run" / "successive_halving" / "artifact" / "recipe.yaml")
    assert found.metrics["winner"] in recipe.description
    page = (tmp_path / "run" / "report_search" / "artifact" / "report.html").read_text()
    assert f"<b>{found.metrics['winner']}</b> was chosen" in page
