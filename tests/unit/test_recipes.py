"""Tests the recipes and stage configs in ``conf``."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from omegaconf import OmegaConf

from launch import schema
from launch.plan import Plan
from launch.planned import load_stage
from launch.schema import CONF
from launch.stages import typed_stages
from nemo_convert.hf_config import SUPPORTED
from recipes.core.files import REPO_ROOT
from recipes.planning.chain import CONFIGS
from recipes.planning.layouts import USABLE_MEMORY_FRACTION, cheapest_proposal
from recipes.planning.training_cost import step_time, training_cost
from recipes.search.space import name_of
from tests.support.runs import DISTILL, settings

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.conftest import Compose, MakePlan

ALL_RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))
RECIPES = [name for name in ALL_RECIPES if name.endswith("_prune")]
"""Recipes that prune and distill a small model on one CPU."""
SMALL = [*RECIPES, "shrink"]
"""``RECIPES``, and ``shrink``, which first searches for a shape of the small model."""
SEARCHES = [name for name in ALL_RECIPES if name.endswith("_search")]
PUBLISHED = {
    "llama3_1_8b_width": (4.51e9, 94e9),
    "llama3_1_8b_depth": (4.54e9, 94e9),
    "qwen3_8b_depth": (5.88e9, 90e9),
    "qwen3_8b_nas": (5.99e9, 90e9),
    "mistral_nemo_12b_width": (8.41e9, 380e9),
}
"""Published numbers of parameters and training tokens, by large recipe."""
LARGE = [name for name in ALL_RECIPES if name not in (*SMALL, *SEARCHES)]
"""Recipes for GPUs that prune published models."""
ENGINES = {"build_teacher_engine", "build_engine"}
"""Stages that build the engines of ``LARGE``."""
STAGE_FILES = sorted((CONF / "stage").glob("*/*.yaml"))


@pytest.fixture(autouse=True)
def _without_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans use the bundled config of a published model, without a request to the hub."""
    monkeypatch.setattr("recipes.planning.chain.is_config_available", lambda _: False)


@pytest.mark.parametrize("recipe", ALL_RECIPES)
def test_recipes_are_short_and_described(recipe: str) -> None:
    text = (CONF / "recipe" / f"{recipe}.yaml").read_text()
    assert len(text.splitlines()) <= 40
    description = schema.recipes()[recipe]
    assert description.strip()
    assert "\n" not in description


@pytest.mark.parametrize("recipe", SMALL)
def test_recipes_plan_every_stage(recipe: str, plan: MakePlan) -> None:
    planned = plan("engine=openvino", recipe=f"recipe={recipe}")
    assert {stage.action for stage in planned.stages} == {"run"}
    for stage in planned.stages:
        assert stage.module == f"recipes.stages.{stage.config.stage}"
        required, optional = stage.definition.inputs, stage.definition.optional_inputs
        assert required.keys() <= stage.inputs.keys() <= {*required, *optional}


SIZES = ("num_layers", "hidden_size", "ffn_hidden_size")


@pytest.mark.parametrize(
    ("recipe", "model", "sizes"),
    [
        ("llama_depth_prune", "smollm2_135m", (24, 576, 1536)),
        ("llama_width_prune", "smollm2_135m", (30, 512, 1152)),
        ("llama_depth_prune", "llama3_1_8b", (26, 4096, 14336)),
        ("llama_width_prune", "llama3_1_8b", (32, 3584, 10752)),
    ],
)
def test_recipes_prune_by_a_fraction_of_any_model(
    recipe: str,
    model: str,
    sizes: tuple[int, ...],
    plan: MakePlan,
) -> None:
    """The depth recipe keeps 0.8 of the layers. The width recipe keeps 0.875 of the hidden size and
    0.75 of the feed-forward size. The same sizes as absolute targets give the same fingerprints.
    """
    overrides = [f"model={model}", "skip_rules=[memory,bundled-config]"]
    planned = plan(*overrides, recipe=f"recipe={recipe}")
    student = planned.chain.shape_of("prune")
    assert tuple(getattr(student, axis) for axis in SIZES) == sizes
    teacher = planned.chain.teacher
    pruned_axes = [axis for axis in SIZES if getattr(student, axis) != getattr(teacher, axis)]
    targets = {axis: getattr(student, axis) for axis in pruned_axes}
    overrides += [f"stages.prune.target_{axis}={size}" for axis, size in targets.items()]
    absolute = plan(*overrides, recipe=f"recipe={recipe}")
    assert [s.fingerprint for s in absolute.stages] == [s.fingerprint for s in planned.stages]
    [prune] = [stage.config for stage in planned.stages if stage.name == "prune"]
    assert {axis: getattr(prune, f"target_{axis}") for axis in targets} == targets


def test_a_recipe_overrides_the_groups_of_its_chain(compose: Compose, tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults: [/chain@_global_: prune_distill, override /tasks: quick, _self_]\n"
        "stages: {evaluate_tasks: {limit: 7}}\n"
    )
    stages = compose(f"hydra.searchpath=[file://{tmp_path}]", "recipe=mine").stages
    assert stages.evaluate_tasks.limit == 7
    assert (
        stages.evaluate_tasks.tasks
        == compose("recipe=llama_depth_prune").stages.evaluate_tasks.tasks
    )


@pytest.mark.parametrize(
    ("engine", "student"),
    [
        ("null", None),
        ("openvino", "export_hf"),
        ("tensorrt_llm", "export_hf"),
        ("tensorrt_llm_quantized", "quantize"),
    ],
)
def test_the_group_engine_chooses_the_engines_of_the_report(
    engine: str, student: str | None, plan: MakePlan
) -> None:
    """``student`` is the stage whose checkpoint the engine is built from; ``None`` without one."""
    sizes = ["stages.prune.target_hidden_size=128", "stages.prune.target_ffn_hidden_size=128"]
    backend = "stages.build_engine.backend=tensorrt_llm_pytorch"  # also sets the teacher's engine
    options = [backend] if engine.startswith("tensorrt_llm") else []
    planned = {s.name: s for s in plan(f"engine={engine}", *sizes, *options).stages}
    report = planned["report"].config.inputs
    if student is None:
        assert not {"engine", "speed"} & report.keys()
        assert "measure_speed" not in planned
        return
    assert (report["engine"], report["speed"]) == ("build_engine", "measure_speed")
    assert planned["build_engine"].config.inputs["checkpoint"] == student
    assert planned["measure_speed"].config.inputs["student"] == student
    engines: Any = [planned[name].config for name in ("build_engine", "build_teacher_engine")]
    assert engines[0].backend == engines[1].backend
    if engine != "openvino":  # NeMo, which exports the teacher, is not in TensorRT-LLM's image
        assert planned["build_teacher_engine"].inputs["checkpoint"].kind == "checkpoint_hf"


@pytest.mark.parametrize(
    ("teacher", "order"),
    [
        ("live", ["import_hf", "distill"]),
        ("cached", ["import_hf", "cache_logits", "distill"]),
        ("corrected", ["import_hf", "correct_teacher", "distill"]),
        ("corrected_cached", ["import_hf", "correct_teacher", "cache_logits", "distill"]),
    ],
)
def test_the_group_teacher_chooses_the_teacher_of_the_distillation(
    teacher: str, order: list[str], plan: MakePlan
) -> None:
    """Each stage in ``order`` has the previous one as its teacher; ``evaluate``, the original."""
    planned = {s.name: s for s in plan(f"teacher={teacher}").stages}
    for previous, stage in pairwise(order):
        assert planned[stage].config.inputs["teacher"] == previous
    assert planned["evaluate"].config.inputs["teacher"] == "import_hf"
    assert len(planned) == 7 + len(order)  # seven stages do not depend on the group


@pytest.mark.parametrize("recipe", SMALL)
def test_recipes_have_typed_stages_of_one_device_and_one_sequence_length(
    recipe: str, compose: Compose
) -> None:
    cfg = compose(f"recipe={recipe}", "data.seq_length=77")
    assert cfg.recipe_name == recipe
    typed = typed_stages(cfg)
    for name, config in typed.items():
        assert type(config) is load_stage(config.stage).config, name
    assert {config.resources.devices for config in typed.values()} == {1}
    lengths = {config.seq_length for config in typed.values() if hasattr(config, "seq_length")}
    assert lengths == {77}


def plan_large(recipe: str, plan: MakePlan, *overrides: str) -> Plan:
    """Plans a large recipe; skips the test if its model cannot be converted."""
    model = recipe.removesuffix("_2.5b").rpartition("_")[0]
    hf_path = str(OmegaConf.load(CONF / "model" / f"{model}.yaml").hf_path)
    [family] = CONFIGS[hf_path]["architectures"]
    if family not in SUPPORTED:
        pytest.skip(f"{family} cannot be converted yet")
    planned = plan(*overrides, recipe=f"recipe={recipe}")
    assert planned.chain.hf_path == hf_path
    return planned


@pytest.mark.parametrize("recipe", LARGE)
def test_large_recipes_have_published_sizes_and_pass_all_checks_of_a_plan(
    recipe: str, plan: MakePlan
) -> None:
    """The only warnings: config.json is the bundled copy; Llama's published reduction is large."""
    planned = plan_large(recipe, plan)
    expected = {"large-reduction"} if recipe.startswith("llama3_1_8b") else set()
    assert {note.rule.name for note in planned.notes} - {"bundled-config"} == expected
    assert planned.chain.hardware.name == "h100"
    workload = planned.chain.workloads["distill"]
    assert workload.teacher is not None
    assert (
        training_cost(workload, planned.chain.hardware).memory.total < 80e9 * USABLE_MEMORY_FRACTION
    )
    parameters, tokens = PUBLISHED[recipe.removesuffix("_2.5b")]
    assert workload.trained is not None
    assert workload.trained.parameters() == pytest.approx(parameters, rel=0.002)
    has_small_budget = recipe.endswith("_2.5b")
    assert workload.tokens == pytest.approx(2.5e9 if has_small_budget else tokens, rel=0.01)
    assert (workload.layout.nodes == 1) == has_small_budget
    stages = {"import_hf", "score", "evaluate", "export_hf"}
    stages |= {"evaluate_tasks", "export_teacher", "measure_speed", "evaluate_served"}
    stages |= ENGINES
    assert planned.chain.inference_costs.keys() == stages
    for name, cost in planned.chain.inference_costs.items():
        config = planned.chain.stages[name]
        assert cost.memory.total < 80e9 * USABLE_MEMORY_FRACTION
        precision = "bf16" if name in ENGINES else "bf16-mixed"
        assert getattr(config, "precision", precision) == precision


@pytest.mark.parametrize("recipe", LARGE)
def test_large_recipes_accept_the_settings_of_the_first_day(recipe: str, plan: MakePlan) -> None:
    page = (REPO_ROOT / "docs" / "first_day_on_slurm.md").read_text()
    [setting] = re.findall(r"Start with `'?(stages\.distill.+?)'?`", page)
    distill: Any = plan_large(recipe, plan, setting).chain.stages["distill"]
    assert distill.max_steps == 20


@pytest.mark.parametrize("recipe", [*LARGE, "qwen3_8b_search"])
def test_large_recipes_keep_their_sequence_length_with_other_text(
    recipe: str, compose: Compose
) -> None:
    lengths = {compose(f"recipe={recipe}", *data).data.seq_length for data in ([], ["data=chat"])}
    assert len(lengths) == 1


@pytest.mark.parametrize("recipe", LARGE)
def test_large_recipes_correct_the_teacher_in_the_layout_of_the_distillation(
    recipe: str, plan: MakePlan
) -> None:
    workloads = plan_large(recipe, plan, "teacher=corrected").chain.workloads
    assert workloads["correct_teacher"].layout == workloads["distill"].layout


@pytest.mark.parametrize("recipe", LARGE)
def test_large_recipes_evaluate_on_eight_ranks_and_have_gates(recipe: str, plan: MakePlan) -> None:
    """Benchmarks, gates and engines are optional."""
    planned = plan_large(recipe, plan)
    split_stages = ("score", "evaluate", "evaluate_tasks")  # the ranks split text or items
    assert {planned.chain.stages[name].resources.ranks for name in split_stages} == {8}
    one_device = [f"stages.{name}.resources.devices=1" for name in split_stages]
    on_one_rank = plan_large(recipe, plan, *one_device)
    hardware = planned.chain.hardware
    for name in split_stages:
        cost, slow_cost = (p.chain.inference_costs[name] for p in (planned, on_one_rank))
        assert cost.hours(hardware) == pytest.approx(slow_cost.hours(hardware) / 8, rel=0.02)
    assert planned.chain.inference_costs["measure_speed"].hours(hardware) > 0
    quality, served = planned.gates
    assert quality.name == ("recovered.mmlu" if recipe.endswith("_2.5b") else "score.mmlu")
    assert served.name == "served_difference_low.gsm8k_cot"
    assert "gsm8k_cot" in getattr(planned.chain.stages["evaluate_tasks"], "tasks")
    assert not plan_large(recipe, plan, "gates=[]").gates
    minimal = plan_large(recipe, plan, "tasks=null", "engine=null")
    assert not minimal.gates
    optional = {"evaluate_tasks", "build_engine", "measure_speed", "evaluate_served"}
    assert not optional & minimal.chain.stages.keys()


@pytest.mark.parametrize(
    ("options", "is_served", "gates"),
    [
        (
            ["engine=tensorrt_llm_quantized"],
            True,
            ["score.mmlu", "served_difference_low.gsm8k_cot"],
        ),
        (["engine=null"], False, ["score.mmlu"]),
        (["served=null"], False, ["score.mmlu"]),
        (["tasks=null"], True, []),
    ],
)
def test_the_gate_on_the_engine_needs_engine_served_and_tasks(
    options: list[str], is_served: bool, gates: list[str], plan: MakePlan
) -> None:
    planned = plan_large("qwen3_8b_depth", plan, *options)
    assert ("evaluate_served" in planned.chain.stages) == is_served
    assert [gate.name for gate in planned.gates] == gates


def test_depth_pruned_llama_keeps_the_published_layers(plan: MakePlan) -> None:
    """The published model keeps layers 1 to 15 and the last layer."""
    prune: Any = plan_large("llama3_1_8b_depth", plan).chain.stages["prune"]
    assert set(range(1, 33)) - set(prune.drop_layers) == {*range(1, 16), 32}


def test_plan_warns_of_text_that_forbids_commercial_use(plan: MakePlan) -> None:
    notes = plan_large("qwen3_8b_depth", plan, "data=climbmix").notes
    [note] = [note for note in notes if note.rule.name == "licence"]
    assert "CC-BY-NC-4.0, forbids commercial use" in note.what


@pytest.mark.parametrize("data", ["fineweb_edu", "instruct_blend"])
def test_large_recipes_work_with_other_text(data: str, plan: MakePlan) -> None:
    planned = plan_large("qwen3_8b_depth", plan, f"data={data}")
    configs = {stage.name: vars(stage.config) for stage in planned.stages}
    assert all("licence=" in source for source in configs["prepare_data"]["sources"])
    blend = {"web": 30, "math": 42, "science": 21, "chat": 7}
    assert configs["distill"]["weights"] == (blend if data == "instruct_blend" else {})


@pytest.mark.parametrize("recipe", [name for name in LARGE if name.startswith("qwen3")])
def test_qwen3_has_the_cheapest_layout_and_the_published_layout_fits_too(
    recipe: str, plan: MakePlan
) -> None:
    """The published layout has a tensor-parallel size of 8."""
    device_hours, step_seconds = [], []
    for overrides in ((), ("stages.distill.tensor_model_parallel_size=8",)):
        planned = plan_large(recipe, plan, *overrides)
        workload, hardware = planned.chain.workloads["distill"], planned.chain.hardware
        device_hours.append(training_cost(workload, hardware).device_hours)
        step_seconds.append(step_time(workload, hardware).total)
    # Of the last workload, the proposals only keep the numbers of ranks and devices.
    cheapest = cheapest_proposal(workload, hardware, workload.layout.ranks, workload.layout.devices)
    assert cheapest is not None
    assert cheapest.cost.device_hours == pytest.approx(device_hours[0], rel=1e-3)
    # Compares the time of a step, because pauses for checkpoints are the same in both layouts.
    assert step_seconds[0] < 0.97 * step_seconds[1]


def test_the_search_of_a_large_model_lists_the_published_shape(plan: MakePlan) -> None:
    planned = plan(recipe="recipe=qwen3_8b_search")
    assert {note.rule.name for note in planned.notes} <= {"bundled-config"}
    stages: dict[str, Any] = dict(planned.chain.stages)
    search = stages["enumerate_shapes"]
    assert search.service.device == "h100"
    names = {name_of(shape) for shape in search.shapes(planned.chain.teacher)}
    assert "l30-h3584-f11776-a32" in names  # layers, hidden and feed-forward size, heads
    assert 10 < len(names) < 200  # a choice of shapes, but not too many to rank


def test_every_large_recipe_has_a_small_budget() -> None:
    assert {*PUBLISHED, *(f"{name}_2.5b" for name in PUBLISHED)} == set(LARGE)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_small_budget_changes_only_tokens_layout_title_and_gates(
    recipe: str, compose: Compose
) -> None:
    # Gives both recipes the same tokens and layout. Titles and gates are deleted below.
    same_values = [*settings("distill", **DISTILL), "stages.prepare_data.max_tokens=1"]
    full_budget, small_budget = (
        OmegaConf.to_container(compose(f"recipe={name}", *same_values).stages, resolve=True)
        for name in (recipe, f"{recipe}_2.5b")
    )
    for stages in (full_budget, small_budget):
        del stages["report"]["title"], stages["report"]["description"], stages["report"]["gates"]
        del stages["export_hf"]["recipe"]  # the recipe's name
    assert small_budget == full_budget


@pytest.mark.parametrize("file", STAGE_FILES, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_stage_configs_name_their_stage_and_its_inputs(file: Path) -> None:
    cfg: Any = OmegaConf.to_container(OmegaConf.load(file))
    assert cfg["defaults"] == ["schema", "_self_"]
    assert cfg["stage"] == file.parent.name
    stage = load_stage(cfg["stage"])
    allowed = {*stage.inputs, *stage.optional_inputs}
    assert stage.inputs.keys() <= cfg.get("inputs", {}).keys() <= allowed
