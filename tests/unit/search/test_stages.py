"""Tests plans and settings of a search's stages.

The teacher of ``chain`` and ``tiny`` has 4 layers, hidden size 128, feed-forward size 256, 8 heads
in 4 groups, and 1024 positions.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from launch.stages import with_shapes
from recipes.core.errors import RecipeError
from recipes.core.manifest import write_manifest
from recipes.core.stage import Resources
from recipes.distillation.settings import DistillConfig
from recipes.engines.settings import BuildEngineConfig
from recipes.planning.chain import Chain
from recipes.planning.transformer import Storage
from recipes.search.settings import (
    EnumerateShapesConfig,
    RankCandidatesConfig,
    SuccessiveHalvingConfig,
)
from recipes.search.space import Budget, Service, Space, name_of
from recipes.stages import enumerate_shapes, measure_latency, rank_candidates, successive_halving
from tests.support.manifests import bare_manifest
from tests.support.runs import settings
from tests.unit.conftest import notes_of, stage_named

if TYPE_CHECKING:
    from tests.unit.conftest import Complete, Launch, MakePlan

RECIPE = "recipe=shrink"
SERVICE = "stages.enumerate_shapes.service"
FOUR_RANKS = {"tensor_model_parallel_size": 4, "resources.devices": 4}
LARGE = [
    "model=llama3_1_8b",
    "hardware=h100",
    *settings("enumerate_shapes.space", tensor_model_parallel_size=4),
    *settings("distill", **FOUR_RANKS),
    *settings("successive_halving.distill", **FOUR_RANKS),
]
"""Overrides for Llama 3.1 8B, trained on four H100."""


@pytest.fixture
def tiny(hf_folder: Path) -> list[str]:
    """Overrides for the small model in ``hf_folder``."""
    space = "stages.enumerate_shapes.space={hidden_size_divisor: 32, ffn_hidden_size_divisor: 32}"
    return [f"model.hf_path={hf_folder}", space, "data.seq_length=64"]


@pytest.fixture
def other_search(tmp_path: Path) -> Path:
    """The stage directory of another run's search. The search chose no shape."""
    stage_dir = tmp_path / "other"
    (stage_dir / "artifact").mkdir(parents=True)
    write_manifest(stage_dir, bare_manifest("successive_halving", "search_results", None))
    return stage_dir


@pytest.mark.parametrize(
    ("budget", "min_fraction", "max_fraction"),
    [
        ("parameters=0.7", 0.69, 0.7),
        # A decoding step also reads the KV cache, so its time is not proportional to parameters.
        ("latency_ms=0.7 budget.parameters=null", 0.6, 0.75),
        # At this rate, a step takes about 0.7 of the teacher's time.
        ("tokens_per_second=305 budget.parameters=null", 0.6, 0.75),
    ],
)
def test_the_plan_assumes_the_largest_shape_within_the_budget(
    plan: MakePlan,
    monkeypatch: pytest.MonkeyPatch,
    budget: str,
    min_fraction: float,
    max_fraction: float,
) -> None:
    """The fractions limit the student's parameters, relative to the teacher's."""
    monkeypatch.setitem(sys.modules, "torch", None)  # a login node may not have torch
    # The teacher's config is not downloaded; the plan uses the published config.
    monkeypatch.setattr("recipes.planning.chain.is_config_available", lambda _: False)
    planned = plan(*LARGE, *f"budget.{budget}".split(), recipe=RECIPE)
    chain = planned.chain
    student = chain.shape_of("prune")
    fraction = student.parameters() / chain.teacher.parameters()
    assert min_fraction < fraction <= max_fraction
    [note] = notes_of(planned, "searched-shape")
    assert name_of(student) in note.what
    assert chain.workloads["distill"].trained == student
    search: Any = chain.stages["enumerate_shapes"]
    assert student == max(search.shapes(chain.teacher), key=lambda s: s.parameters())
    assert stage_named(planned, "prune").inputs["shape"].kind == "search_results"
    names = [stage.name for stage in planned.stages]
    assert names.index("successive_halving") < names.index("prune") < names.index("distill")


def test_another_budget_reuses_stages_that_do_not_depend_on_it(
    plan: MakePlan, complete: Complete, tiny: list[str]
) -> None:
    complete(plan(*tiny, recipe=RECIPE))
    assert plan(*tiny, recipe=RECIPE).todo() == []
    smaller = plan(*tiny, "budget.parameters=0.6", recipe=RECIPE)
    reasons = {stage.name: stage.reason for stage in smaller.todo()}
    assert not {"import_hf", "prepare_data", "score"} & reasons.keys()
    assert reasons["rank_candidates"] == "input shapes changed"
    assert reasons["prune"] == "input shape changed"
    assert reasons["distill"] == "input student changed"


@pytest.mark.parametrize(
    ("override", "messages"),  # ``OTHER`` is the directory of ``other_search``
    [
        ("target_num_layers=3", ("~stages.prune", "prune-target")),
        ("drop_layers=[2]", ("~stages.prune", "prune-target")),
        ("inputs.shape=rank_candidates", ("rank_candidates", "successive_halving")),
        ("inputs.shape=OTHER", ("did not choose", "run it again")),
        ("layer_importance=block", ("=block, but rank_candidates", "rank_candidates.layer")),
    ],
)
def test_an_invalid_input_of_prune_is_refused(
    plan: MakePlan, tiny: list[str], other_search: Path, override: str, messages: tuple[str, str]
) -> None:
    override = override.replace("OTHER", str(other_search))
    with pytest.raises(RecipeError, match="(?s:.*)".join(messages)):
        plan(*tiny, f"stages.prune.{override}", recipe=RECIPE)


def test_any_recipe_can_use_the_shape_that_another_run_chose(
    plan: MakePlan, tiny: list[str], other_search: Path
) -> None:
    search = bare_manifest("successive_halving", "search_results", None)
    shape = plan(*tiny, recipe=RECIPE).chain.shape_of("prune")
    search.architecture = shape.as_dict() | {"num_layers": 3, "ffn_hidden_size": 160}
    write_manifest(other_search, search)
    overrides = [
        f"+stages.prune.inputs.shape={other_search}",
        "stages.prune.target_num_layers=null",
    ]
    model, _, length = tiny  # without the override of the space: this recipe has no search
    planned = plan(model, length, *overrides, recipe="recipe=llama_depth_prune")
    student = planned.chain.shape_of("prune")
    assert (student.num_layers, student.ffn_hidden_size) == (3, 160)
    assert not notes_of(planned, "searched-shape")
    # A shape cannot come from this model if it is larger, or if an axis that no search prunes
    # (here the vocabulary) has another size.
    for axis in ("hidden_size", "vocab_size"):
        search.architecture = shape.as_dict() | {axis: 2 * getattr(shape, axis)}
        write_manifest(other_search, search)
        with pytest.raises(RecipeError, match=f"{axis}=(?s:.*)prune-target"):
            plan(model, length, *overrides, recipe="recipe=llama_depth_prune")


def test_the_launcher_prints_the_shapes(launch: Launch, hf_folder: Path) -> None:
    done = launch(
        "recipe=llama_search",
        "only=[enumerate_shapes]",
        f"model.hf_path={hf_folder}",
        "stages.enumerate_shapes.space={hidden_size_divisor: 32, ffn_hidden_size_divisor: 64}",
        "data.seq_length=64",
        "run_dir=run",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Names of shapes, such as l4-h96-f192-a8. Two shapes cannot grow within the budget.
    assert len(re.findall(r"l\d-h\d+-f\d+-a8", done.stdout)) == 2
    assert "latency by roofline of cpu" in done.stdout
    assert re.search(r"enumerate_shapes +ran .* \d+ shapes", done.stdout)


@pytest.mark.parametrize(("budget", "reruns"), [("parameters", False), ("latency_ms", True)])
def test_another_device_is_a_reason_to_search_again_only_if_the_budget_limits_speed(
    plan: MakePlan, complete: Complete, budget: str, reruns: bool
) -> None:
    search = ("only=[enumerate_shapes]", f"budget={{parameters: null, {budget}: 0.7}}")
    complete(plan(*search, "model=llama3_1_8b", "hardware=h100", recipe=RECIPE))
    plan_for_h200 = plan(*search, "model=llama3_1_8b", "hardware=h200", recipe=RECIPE)
    assert bool(plan_for_h200.todo()) is reruns


@pytest.mark.parametrize("recipe", ["llama_search", "shrink"])
def test_latency_is_measured_in_the_search_space(plan: MakePlan, recipe: str) -> None:
    space = "stages.enumerate_shapes.space.hidden_size_divisor=32"
    service = f"{SERVICE}.batch_size=4"
    overrides = ("latency_model=measured", space, service)
    with pytest.raises(RecipeError, match="does not limit latency"):
        plan(*overrides, recipe=f"recipe={recipe}")
    budget = "stages.enumerate_shapes.budget={parameters: null, latency_ms: 0.7}"
    planned = plan(*overrides, budget, recipe=f"recipe={recipe}")
    stages = {stage.name: stage for stage in planned.stages}
    measurement: Any = stages["measure_latency"].config
    search: Any = stages["enumerate_shapes"].config
    assert (measurement.space, measurement.service) == (search.space, search.service)
    assert str(search.service.speed).startswith("cpu")
    assert (search.space.hidden_size_divisor, search.service.batch_size) == (32, 4)
    assert search.service.precision == measurement.engine.precision == "fp32"
    assert stages["enumerate_shapes"].inputs["latency"].kind == "latency_model"


def test_latency_is_measured_with_the_engine_of_the_recipe(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.planning.chain.is_config_available", lambda _: False)
    budget = ("budget.parameters=null", "budget.latency_ms=0.7")
    large = (*LARGE, "latency_model=measured", *budget)
    stages: Any = SimpleNamespace(**plan(*large, "engine=tensorrt_llm", recipe=RECIPE).chain.stages)
    engine, service = stages.measure_latency.engine, stages.enumerate_shapes.service
    assert (engine.backend, engine.precision) == ("tensorrt_llm", "bf16")
    limits = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens")
    assert all(getattr(engine, name) == getattr(stages.build_engine, name) for name in limits)
    assert (service.precision, service.storage) == ("bf16", Storage("bf16", None, 2))
    # Without ``latency_model=measured``, latency comes from the roofline.
    roofline = plan(*LARGE, *budget, "engine=tensorrt_llm_quantized", recipe=RECIPE)
    stages = SimpleNamespace(**roofline.chain.stages)
    assert stages.enumerate_shapes.service.storage == stages.build_engine.storage
    with pytest.raises(RecipeError, match="max_batch_size=32, but the timed requests need 64"):
        plan(*large, "engine=tensorrt_llm", f"{SERVICE}.batch_size=64", recipe=RECIPE)
    with pytest.raises(RecipeError, match="fp8 need calibrated weights"):
        plan(*large, "engine=tensorrt_llm_quantized", recipe=RECIPE)
    with pytest.raises(RecipeError, match="the search is for h100"):
        plan(*large, "engine=null", recipe=RECIPE)


HALF, THIRDS = Budget(parameters=0.5), Space(tensor_model_parallel_size=3)  # 3 cannot split 8 heads
TOO_FAST, SLOW = Budget(tokens_per_second=1e12), Budget(tokens_per_second=0.7)
TWO_NODES = {"num_candidates": 1, "distill": DistillConfig(resources=Resources(nodes=2))}
RANKS = Resources(devices=2)
TWO_DEVICES = {"num_candidates": 1, "resources": RANKS, "distill": DistillConfig(resources=RANKS)}
SHORT_CONTEXT = Service(context_length=256)
LARGE_BATCH = Service(context_length=256, batch_size=16)
INT3_ENGINE = BuildEngineConfig(precision="int3")
TRTLLM_ENGINE = BuildEngineConfig(backend="tensorrt_llm_pytorch", precision="bf16")
SHORT_ENGINE = dataclasses.replace(TRTLLM_ENGINE, max_seq_len=250)
TOO_LONG = {"service": SHORT_CONTEXT, "engine": SHORT_ENGINE}  # 256 tokens for an engine of 250


@pytest.mark.parametrize(
    ("stage", "settings", "rule", "message"),
    [
        (enumerate_shapes, {}, "budget", "budget.parameters"),
        (enumerate_shapes, {"budget": Budget(parameters=10.0)}, "budget", "no architecture fits"),
        (enumerate_shapes, {"budget": HALF, "space": THIRDS}, "budget", "attention_heads"),
        (enumerate_shapes, {"budget": TOO_FAST}, "budget", "lower tokens_per_second"),
        (enumerate_shapes, {"budget": SLOW}, "budget", "the teacher is within the budget"),
        (measure_latency, {"service": Service(context_length=8)}, "length", "new_tokens"),
        (measure_latency, {"service": Service(context_length=2000)}, "length", "more than the"),
        (measure_latency, {"service": SHORT_CONTEXT, "engine": INT3_ENGINE}, "format", "int3"),
        (measure_latency, TOO_LONG, "engine-limits", "250"),
        (measure_latency, {"service": LARGE_BATCH, "engine": TRTLLM_ENGINE}, "engine-limits", "16"),
        (rank_candidates, {"seq_length": 2000}, "seq-length", "2000"),
        (successive_halving, {"max_tokens": 9000}, "search", "max_tokens=9000"),
        (successive_halving, TWO_NODES, "search", "distill.resources.nodes=2"),
        (successive_halving, TWO_DEVICES, "search", "distill.resources.devices=2"),
    ],
)
def test_invalid_settings_are_refused(
    chain: Chain, stage: Any, settings: dict[str, Any], rule: str, message: str
) -> None:
    problems = stage.STAGE.check(stage.STAGE.config(**settings), chain)
    # The small teacher has heads of size 16, which some engines do not support.
    [problem] = [p for p in problems if p.rule.name != "head-size"]
    assert problem.rule.name == rule
    assert message in str(problem)


def test_the_cost_of_a_search_without_a_single_step_is_estimated(chain: Chain) -> None:
    cfg = SuccessiveHalvingConfig(max_tokens=9000, inputs={"candidates": "ranking"})
    flops = successive_halving.inference_cost(cfg, chain).compute.flops
    assert flops > 0  # those of the evaluations


def test_a_search_of_an_moe_is_refused(chain: Chain) -> None:
    moe = dataclasses.replace(chain.teacher, num_moe_experts=8)
    cfg = EnumerateShapesConfig(budget=Budget(parameters=0.5))
    [problem] = enumerate_shapes.check(cfg, dataclasses.replace(chain, teacher=moe))
    assert problem.rule.name == "budget"


def test_rounds_halve_the_candidates_within_the_token_budget(chain: Chain) -> None:
    cfg = SuccessiveHalvingConfig(num_candidates=4, also=["x"], max_tokens=120_000)
    round_sizes = cfg.round_sizes(cfg.max_candidates())  # number of candidates in each round
    assert round_sizes == [5, 3, 2]  # the first round has the four best-ranked candidates and x
    trainings = [successive_halving.training_of(cfg, round_sizes, number) for number in range(3)]
    # The number of steps is rounded down. A step trains on 4 sequences of 256 tokens.
    steps = sum(size * t.max_steps for size, t in zip(round_sizes, trainings, strict=True))
    assert 0.9 * cfg.max_tokens < steps * 4 * 256 <= cfg.max_tokens
    assert len({training.seed for training in trainings}) == 3, "a round repeats sequences"
    assert list(successive_halving.check(cfg, chain)) == []
    single = SuccessiveHalvingConfig(num_candidates=1, max_tokens=0)
    assert single.round_sizes(single.max_candidates()) == []
    assert list(successive_halving.check(single, chain)) == []


def test_unknown_names_of_candidates_are_refused(chain: Chain) -> None:
    space = Space(hidden_size_divisor=32, ffn_hidden_size_divisor=64)
    search = EnumerateShapesConfig(
        stage="enumerate_shapes", budget=Budget(parameters=0.75), space=space
    )
    ranking = RankCandidatesConfig(stage="rank_candidates", inputs={"shapes": "shapes"})
    stages = {"shapes": search, "ranking": ranking}
    chain = with_shapes(dataclasses.replace(chain, stages=stages), stages)
    name = name_of(search.shapes(chain.teacher)[0])  # ends with the number of heads, 8
    for also, messages in (
        ([name], []),
        ([name, name[:-1] + "9"], [f"Did you mean '{name}'?"]),
    ):
        cfg = SuccessiveHalvingConfig(also=also, inputs={"candidates": "ranking"})
        problems = list(successive_halving.check(cfg, chain))
        assert {problem.rule.name for problem in problems} <= {"search"}
        assert all(message in p.what for message, p in zip(messages, problems, strict=True))
    # If the budget is a measured latency, candidates are unknown before the measurement.
    timed = dataclasses.replace(search, inputs={"latency": "measure_latency"})
    stages = {**stages, "shapes": timed}
    chain = with_shapes(dataclasses.replace(chain, stages=stages), stages)
    assert list(successive_halving.check(cfg, chain)) == []


PARAMETERS = ("budget.parameters=0.6",)
MEASURED = ("latency_model=measured", "budget={parameters: null, latency_ms: 0.6}")


@pytest.mark.parametrize(
    ("budget", "method", "score_setting", "fix"),
    [
        (PARAMETERS, "block", "block_sizes=[1]", "block_sizes=[1,2]"),
        (PARAMETERS, "block", "block_sizes=null", "block_sizes=[1,2]"),
        (PARAMETERS, "block", "block_sizes=[1,2]", None),
        (PARAMETERS, "loss", "num_loss_samples=0", "num_loss_samples=8"),
        (PARAMETERS, "block_influence", "num_loss_samples=0", None),
        # With a measured latency, the shapes are not known yet. All depths of the space count.
        (MEASURED, "block", "block_sizes=[1]", "block_sizes=[1,2]"),
        (MEASURED, "block", "block_sizes=[1,2]", None),
        (MEASURED, "loss", "num_loss_samples=0", "num_loss_samples=8"),
    ],
)
def test_the_scores_must_rank_the_layers_of_every_candidate(
    plan: MakePlan,
    tiny: list[str],
    budget: tuple[str, ...],
    method: str,
    score_setting: str,
    fix: str | None,
) -> None:
    """The space allows 2 to 4 layers, so candidates drop blocks of 1 or 2 layers."""
    depth = "stages.enumerate_shapes.space.max_depth_pruning=0.5"
    methods = (f"stages.score.{score_setting}", f"stages.rank_candidates.layer_importance={method}")
    overrides = (*tiny, *budget, depth, *methods)
    if fix is None:
        plan(*overrides, recipe=RECIPE)
        return
    with pytest.raises(RecipeError, match=r"rank_candidates(?s:.*)\[layer-importance\]") as caught:
        plan(*overrides, recipe=RECIPE)
    assert f"stages.score.{fix}" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("intermediate_layer_pairs=[[4,4]]", r"student's layers \[4\].*1 to 3"),
        ("pipeline_model_parallel_size=2 hidden_pipeline_stages=1", "pipeline_stages selects"),
        ("recompute_granularity=full", "recompute_granularity=full"),
    ],
)
def test_losses_on_hidden_states_must_be_possible_for_every_candidate(
    plan: MakePlan, tiny: list[str], settings: str, message: str
) -> None:
    training = ["hidden_weight=1", *settings.split()]
    if "pipeline" in settings:
        training.append("resources.devices=2")
    overrides = [f"stages.successive_halving.distill.{setting}" for setting in training]
    with pytest.raises(RecipeError, match=message):
        plan(*tiny, *overrides, recipe=RECIPE)
