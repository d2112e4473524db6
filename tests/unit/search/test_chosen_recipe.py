"""Tests the ranking of candidates, and the recipe that a search writes for the chosen one."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from recipes.core.stage import Input, Resources
from recipes.data.settings import PrepareDataConfig
from recipes.distillation.settings import DistillConfig
from recipes.planning.chain import Chain
from recipes.pruning.settings import ScoreConfig
from recipes.search.results import Candidate
from recipes.search.settings import SuccessiveHalvingConfig
from recipes.stages import rank_candidates, successive_halving
from tests.support.manifests import bare_manifest

if TYPE_CHECKING:
    from tests.unit.conftest import MakePlan


def test_the_chosen_recipe_has_the_models_text_and_hardware_of_the_search(
    chain: Chain, plan: MakePlan, hf_folder: Path, text: Path, tmp_path: Path
) -> None:
    """Writes the recipe, plans it, and compares the plan's settings with those of the search."""
    scoring = ScoreConfig(
        "score",
        num_calibration_samples=16,
        num_loss_samples=0,
        block_sizes=[],
        micro_batch_size=2,
        seed=7,
        resources=Resources(devices=2),
    )
    text_settings = PrepareDataConfig(
        sources=[str(text)], seq_length=64, calibration_fraction=0.1, max_tokens=50_000
    )
    teacher = bare_manifest("import_hf", "checkpoint_nemo", None)
    configs = {
        "checkpoint": {"hf_path": str(hf_folder)},
        "importance": asdict(scoring),
        "data": asdict(text_settings),
    }
    inputs = {
        name: Input(tmp_path, replace(teacher, config=config, architecture=chain.teacher.as_dict()))
        for name, config in configs.items()
    }
    # The teacher has 4 layers and hidden size 128. Its other sizes do not change.
    shape = replace(chain.teacher, num_layers=3, hidden_size=64)
    winner = Candidate(
        "name", 10**6, shape, proxy=1.0, perplexity=9.0, kl_to_teacher=0.1, tokens=10, chosen=True
    )
    distill = DistillConfig(lr=2e-4, global_batch_size=8, tensor_model_parallel_size=2)
    distill.hidden_pipeline_stages = 1  # the default, which the recipe must not copy
    distill.resources.devices = 4
    distill.weights = dict.fromkeys(text_settings.training_names(), 2.0)
    cfg = SuccessiveHalvingConfig(distill=distill, hardware="h100")
    file = tmp_path / "recipe" / "chosen.yaml"
    file.parent.mkdir()
    file.write_text(successive_halving.recipe_yaml(cfg, inputs, winner, "block_influence"))
    assert "hidden_pipeline_stages" not in file.read_text()
    planned = plan(f"hydra.searchpath=[file://{tmp_path}]", recipe="recipe=chosen").chain
    assert (planned.hf_path, planned.hardware.name) == (str(hf_folder), "h100")
    assert planned.shape_of("prune") == shape
    stages: Any = SimpleNamespace(**planned.stages)
    # The settings are equal except for names, inputs and precision: the recipe has its own inputs,
    # and its hardware profile sets the precision.
    prepare_data = replace(stages.prepare_data, stage="???", inputs={})
    assert prepare_data == replace(text_settings, precision=prepare_data.precision)
    score = replace(stages.score, inputs={})
    assert score == replace(scoring, seq_length=64, precision=score.precision)
    assert (stages.distill.seq_length, stages.distill.lm_weight) == (64, 0.0)
    assert (stages.distill.global_batch_size, stages.distill.resources.devices) == (8, 4)
    assert stages.distill.weights == distill.weights
    assert (stages.prune.target_num_layers, stages.prune.target_hidden_size) == (3, 64)
    assert stages.prune.target_ffn_hidden_size is None  # as in the teacher
    assert stages.prune.layer_importance == "block_influence"
    assert (stages.distill.lr, stages.distill.tensor_model_parallel_size) == (2e-4, 2)


def test_the_pareto_front_omits_candidates_that_are_larger_and_no_better(chain: Chain) -> None:
    # Name -> parameters, proxy (lower is better).
    candidate_metrics = {
        "a": (10, 1.0),
        "b": (9, 2.0),
        "c": (9, 3.0),  # as large as b, and worse
        "d": (11, 1.0),  # larger than a, and no better
        "e": (8, 2.5),
        "f": (12, 0.5),  # the only candidate that is not healed
    }
    candidates = [
        Candidate(
            name,
            parameters,
            chain.teacher,
            proxy,
            perplexity=9.0,
            kl_to_teacher=proxy,
            healed=name != "f",
        )
        for name, (parameters, proxy) in candidate_metrics.items()
    ]
    ranked = rank_candidates.ranking(candidates)
    assert [c.name for c in ranked] == ["a", "d", "b", "e", "c", "f"]
    assert [c.name for c in ranked if c.pareto] == ["a", "b", "e"]
    pruned_only = [replace(c, healed=False, pareto=False) for c in candidates]
    front = [c.name for c in rank_candidates.ranking(pruned_only) if c.pareto]
    assert front == ["f", "a", "b", "e"], "without healing, all proxies can be compared"
