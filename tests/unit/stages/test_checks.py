"""The ``check`` functions of the stages, and the contract that every stage module keeps."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest

from launch.planned import load_stage
from launch.schema import CONF
from recipes.core.errors import RecipeError
from recipes.core.stage import Resources, StageConfig
from recipes.data.settings import PrepareDataConfig
from recipes.distillation.settings import DistillConfig
from recipes.evaluation.settings import EvaluateConfig
from recipes.planning.chain import Chain
from recipes.planning.problems import Problem
from recipes.pruning.settings import HealConfig, PruneConfig, ScoreConfig
from recipes.stages import (
    distill,
    evaluate,
    export_gguf,
    export_hf,
    heal,
    import_hf,
    prepare_data,
    prune,
    score,
)
from recipes.stages.contract import Kind, Stage

STAGES = sorted(folder.name for folder in (CONF / "stage").iterdir())

# Gates are judged by the launcher: another threshold runs nothing again.
OTHER_RESOURCES = {"report": ["gates"], "prepare_data": ["processes"]}
LAYOUT = {
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "num_distributed_optimizer_instances",
    "sequence_parallel",
    "micro_batch_size",
    "recompute_granularity",
    "recompute_modules",
    "attention_backend",
    "tp_comm_overlap",
    "compile",
    "cpu_speed_patches",
    "cuda_graphs",
    "profile_steps",
}


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.jsonl").write_text('{"text": "x"}\n')
    return str(tmp_path / "text.jsonl")


def one(problems: Any) -> Problem:
    [problem] = problems
    assert isinstance(problem, Problem)
    return problem


@pytest.mark.parametrize("name", STAGES)
def test_stages_keep_the_contract(name: str, chain: Chain) -> None:
    stage = load_stage(name)
    assert issubclass(stage.config, StageConfig)
    assert dataclasses.is_dataclass(stage.config)
    assert not stage.optional_inputs.keys() & stage.inputs.keys()
    for kinds in [*stage.inputs.values(), *stage.optional_inputs.values()]:
        assert {stage.kind, *kinds} <= set(get_args(Kind))
    assert isinstance(list(stage.problems(stage.config(stage=name), chain)), list)


@pytest.mark.parametrize("wrong", ["kinds", "outputs", "progres"])
def test_a_misspelt_part_of_a_stage_fails_at_import(wrong: str) -> None:
    parts: dict[str, Any] = {**vars(prune.STAGE), wrong: None}
    with pytest.raises(TypeError, match=wrong):
        Stage(**parts)


@pytest.mark.parametrize("part", ["config", "kind", "run"])
def test_a_missing_part_of_a_stage_fails_at_import(part: str) -> None:
    parts: dict[str, Any] = {**vars(prune.STAGE)}
    del parts[part]
    with pytest.raises(TypeError, match=part):
        Stage(**parts)


@pytest.mark.parametrize("stage", STAGES)
def test_stages_mark_only_what_leaves_the_result_alone(stage: str) -> None:
    fields = dataclasses.fields(load_stage(stage).config)
    marked = {f.name for f in fields if f.metadata.get("resource")}
    assert "resources" in marked
    assert marked <= {"resources", *LAYOUT, *OTHER_RESOURCES.get(stage, [])}


def test_prepare_data_accepts_text(text: str, chain: Chain) -> None:
    cfg = PrepareDataConfig(sources=[text])
    assert list(prepare_data.check(cfg, chain)) == []
    assert prepare_data.external(cfg) == {text: Path(text)}


def test_prepare_data_lists_every_bad_source(text: str, chain: Chain) -> None:
    cfg = PrepareDataConfig(sources=["a.csv", text, "missing.txt"])
    found = list(prepare_data.check(cfg, chain))
    assert [p.rule.name for p in found] == ["data-sources", "data-sources"]
    assert "a.csv" in found[0].what
    assert "missing.txt" in found[1].what
    assert list(prepare_data.external(cfg)) == [text]


def test_prepare_data_needs_a_source(chain: Chain) -> None:
    assert one(prepare_data.check(PrepareDataConfig(), chain)).what == "no text is given"


@pytest.mark.parametrize(
    "fractions",
    [
        {"calibration_fraction": 0.94},
        {"validation_fraction": 0.5, "heldout_fraction": 0.5},
    ],
)
def test_prepare_data_needs_a_rest(text: str, chain: Chain, fractions: dict[str, float]) -> None:
    cfg = PrepareDataConfig(sources=[text], **fractions)
    assert one(prepare_data.check(cfg, chain)).rule.name == "data-parts"


def test_prepare_data_knows_the_teachers_positions(text: str, chain: Chain) -> None:
    fits = PrepareDataConfig(sources=[text], seq_length=1024)
    assert list(prepare_data.check(fits, chain)) == []
    problem = one(prepare_data.check(dataclasses.replace(fits, seq_length=1025), chain))
    assert problem.what == "seq_length=1025 is not between 1 and the teacher's 1024 positions"


@pytest.mark.parametrize("stage", [score, distill, evaluate])
def test_other_stages_know_the_teachers_positions(stage: Any, chain: Chain) -> None:
    assert list(stage.check(stage.STAGE.config(seq_length=1025), chain))


def test_seq_length_is_positive(text: str, chain: Chain) -> None:
    assert list(prepare_data.check(PrepareDataConfig(sources=[text], seq_length=0), chain))


def test_prepare_data_fractions_leave_train_out() -> None:
    cfg = PrepareDataConfig(validation_fraction=0.1)
    assert cfg.fractions() == {"validation": 0.1, "calibration": 0.04, "heldout": 0.04}


def test_prepare_data_trains_on_nothing_that_it_holds_out(text: str, chain: Chain) -> None:
    cfg = PrepareDataConfig(sources=[text], heldout_sources=[text])
    assert "to be trained on and held out" in one(prepare_data.check(cfg, chain)).what
    other = PrepareDataConfig(sources=[text], heldout_sources=["missing.txt"])
    assert "missing.txt" in one(prepare_data.check(other, chain)).what


def test_prepare_data_names_parts_without_a_window() -> None:
    tokens = Counter(train=1000, validation=256, calibration=257)
    counts = {"chats": {"used": 3, "shortened": 0, "too long": 90}}
    with pytest.raises(RecipeError, match="validation: 256, heldout: 0") as caught:
        prepare_data._require_windows(tokens, 256, counts)
    assert "Of chats, 3 used, 90 too long." in str(caught.value)
    prepare_data._require_windows(Counter(dict.fromkeys(tokens, 257), heldout=257), 256, {})


def prune_errors(cfg: PruneConfig, chain: Chain) -> list[Problem]:
    """Without the warning that so small a model is cut by more than a third."""
    return [p for p in prune.check(cfg, chain) if p.rule.name != "large-cut"]


def test_prune_passes_targets_on(chain: Chain) -> None:
    good = PruneConfig(target_hidden_size=64, target_ffn_hidden_size=192, target_num_layers=2)
    assert prune_errors(good, chain) == []
    bad = dataclasses.replace(good, target_hidden_size=100, target_ffn_hidden_size=512)
    whats = [p.what for p in prune_errors(bad, chain)]
    assert len(whats) == 2
    assert "target_hidden_size=100 is not a multiple of hidden_size_divisor=64" in whats
    assert prune_errors(dataclasses.replace(good, hidden_size_divisor=4), chain) == []


@pytest.mark.parametrize(
    ("targets", "what", "fix"),
    [
        ({"target_num_layers": 0.9}, "0.9 of the teacher's 4 comes to 4, no less", "below 4"),
        ({"target_num_layers": 0.1}, "0.1 of the teacher's 4 comes to nothing", "below 4"),
        ({"target_hidden_size": 0.8}, "of the teacher's 128 comes to 128", "hidden_size_divisor"),
        ({"target_num_attention_heads": 0.2}, "of the teacher's 8 comes to nothing", "below 8"),
    ],
)
def test_a_share_that_leaves_all_or_nothing_is_refused(
    chain: Chain, targets: dict[str, Any], what: str, fix: str
) -> None:
    problem = one(iter(prune_errors(PruneConfig(**targets), chain)))
    assert problem.rule.name == "prune-target"
    assert what in problem.what
    assert fix in problem.fix


def test_more_than_a_third_of_the_parameters_in_one_go_is_warned_of(chain: Chain) -> None:
    """4 layers of 147,712 parameters, and 65,664 of embeddings and the last norm."""
    every = chain.teacher.parameters()
    assert list(prune.check(PruneConfig(target_num_layers=3), chain)) == []
    half = one(prune.check(PruneConfig(target_num_layers=2), chain))
    left = every - 2 * 147_712
    assert half.what == f"{1 - left / every:.0%} of the parameters go at once"
    assert half.fix.startswith("rounds=2:")


def test_prune_sorts_the_layers_to_drop(chain: Chain) -> None:
    assert PruneConfig(drop_layers=[3, 1]).targets(chain.teacher).drop_layers == (1, 3)


@pytest.mark.parametrize(
    ("method", "setting", "fix"),
    [
        ("loss", {"num_loss_samples": 0}, "stages.score.num_loss_samples=8"),
        ("block", {"block_sizes": [1]}, "stages.score.block_sizes=[2]"),
        ("greedy", {"num_greedy_layers": 1}, "stages.score.num_greedy_layers=2"),
    ],
)
def test_layers_cannot_be_chosen_by_what_is_not_measured(
    chain: Chain, method: str, setting: dict[str, Any], fix: str
) -> None:
    inputs = {"importance": "score"}
    cfg = PruneConfig(target_num_layers=2, layer_importance=method, inputs=inputs)

    def problems(**settings: Any) -> list[Problem]:
        scores = ScoreConfig(**settings)
        return prune_errors(cfg, dataclasses.replace(chain, stages={"score": scores}))

    assert fix in one(iter(problems(**setting))).fix
    assert problems(num_loss_samples=4, block_sizes=[2], num_greedy_layers=2) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layer_importance": "block"}, [2]),
        ({"layer_importance": "block", "target_num_layers": 4}, []),
        ({"layer_importance": "block", "target_num_layers": None, "drop_layers": [1, 2]}, []),
        ({"layer_importance": "block", "inputs": {"importance": "elsewhere"}}, []),
        ({}, []),
    ],
)
def test_the_block_that_is_to_be_dropped_is_measured(
    chain: Chain, settings: dict[str, Any], expected: list[int]
) -> None:
    given = {"target_num_layers": 2, "inputs": {"importance": "score"}, **settings}
    stages = {"score": ScoreConfig(), "prune": PruneConfig(**given)}
    planned = dataclasses.replace(chain, stages=stages)
    assert score.resolve_from_chain(stages["score"], planned).block_sizes == expected
    asked = ScoreConfig(block_sizes=[3])
    assert score.resolve_from_chain(asked, planned) is asked


@pytest.mark.parametrize(
    "settings",
    [
        {"block_sizes": [4]},
        {"num_greedy_layers": 4},
        {"block_sizes": [1], "num_loss_samples": 0},
        {"pipeline_model_parallel_size": 2},
        {"resources": Resources(devices=2)},
        {"resources": Resources(devices=5), "pipeline_model_parallel_size": 5},
    ],
)
def test_score_refuses_what_it_cannot_measure(chain: Chain, settings: dict[str, Any]) -> None:
    assert one(score.check(ScoreConfig(**settings), chain)).fix


def test_score_runs_on_pipeline_ranks(chain: Chain) -> None:
    cfg = ScoreConfig(resources=Resources(devices=4), pipeline_model_parallel_size=4)
    assert list(score.check(cfg, chain)) == []


@pytest.mark.parametrize("resources", [Resources(devices=2), Resources(nodes=2)])
def test_prune_runs_on_one_rank(chain: Chain, resources: Resources) -> None:
    cfg = PruneConfig(target_num_layers=3, resources=resources)
    assert one(prune.STAGE.problems(cfg, chain)).rule.name == "one-rank"


def test_dense_models_are_healed_to_what_they_were_cut_from(chain: Chain) -> None:
    cut = PruneConfig(stage="prune", target_num_layers=3, inputs={"checkpoint": "import_hf"})
    chain = dataclasses.replace(chain, stages={"prune": cut, "distill": DistillConfig()})
    inputs = {"checkpoint": "prune", "teacher": "import_hf", "data": "prepare_data"}
    cfg = HealConfig(stage="heal", inputs=inputs)
    assert list(heal.check(cfg, chain)) == []
    too_long = dataclasses.replace(cfg, seq_length=chain.teacher.max_position_embeddings + 1)
    assert one(heal.check(too_long, chain)).rule.name == "seq-length"
    other = dataclasses.replace(cfg, inputs={**inputs, "teacher": "distill"})
    assert one(heal.check(other, chain)).fix == "set stages.heal.inputs.teacher=import_hf"
    whole = dataclasses.replace(cfg, inputs={**inputs, "checkpoint": "distill"})
    assert "distill, which prunes nothing" in one(heal.check(whole, chain)).what
    experts = dataclasses.replace(chain.teacher, num_moe_experts=4, moe_ffn_hidden_size=64)
    mixture = dataclasses.replace(chain, teacher=experts)
    assert "heal=null" in one(heal.check(cfg, mixture)).fix


def test_a_file_for_llama_cpp_is_of_families_that_it_is_told(chain: Chain) -> None:
    cfg = export_gguf.ExportGgufConfig(stage="export_gguf")
    assert list(export_gguf.check(cfg, chain)) == []
    experts = dataclasses.replace(chain.teacher, hf_architecture="Qwen3MoeForCausalLM")
    problem = one(export_gguf.check(cfg, dataclasses.replace(chain, teacher=experts)))
    assert "gguf=null" in problem.fix


@pytest.mark.parametrize("stage", [import_hf, prepare_data, evaluate, export_hf])
def test_stages_without_parallelism_run_on_one_rank(stage: Any, chain: Chain, text: str) -> None:
    cfg = stage.STAGE.config(resources=Resources(devices=2))
    if stage is prepare_data:
        cfg.sources = [text]
    assert one(stage.STAGE.problems(cfg, chain)).rule.name == "one-rank"


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"warmup_steps": 100}, "schedule"),
        ({"min_lr": 1e-3}, "schedule"),
        ({"global_batch_size": 6}, "batch"),
        ({"tensor_model_parallel_size": 2}, "ranks"),
    ],
)
def test_distill_rules(chain: Chain, fields: dict[str, Any], rule: str) -> None:
    assert one(distill.STAGE.problems(DistillConfig(**fields), chain)).rule.name == rule


def test_distill_lists_all_problems(chain: Chain) -> None:
    cfg = DistillConfig(max_steps=1, kd_weight=0.0, global_batch_size=3)
    rules = [p.rule.name for p in distill.STAGE.problems(cfg, chain)]
    assert rules == ["schedule", "loss", "batch"]


def test_distill_defaults_have_no_problem(chain: Chain) -> None:
    assert list(distill.STAGE.problems(DistillConfig(), chain)) == []


@pytest.mark.parametrize(
    ("target", "parallel"),
    [
        ({"target_num_layers": 1}, "pipeline_model_parallel_size"),
        ({"target_ffn_hidden_size": 129}, "tensor_model_parallel_size"),
    ],
)
def test_distill_knows_the_students_shape(
    chain: Chain, target: dict[str, int], parallel: str
) -> None:
    student = PruneConfig(stage="prune", ffn_hidden_size_divisor=1, **target)
    cfg = DistillConfig(
        stage="distill",
        inputs={"student": "prune"},
        resources=Resources(devices=2),
        **{parallel: 2},
    )
    whole = Chain(chain.hf_path, chain.teacher, {"prune": student, "distill": cfg})
    assert list(distill.STAGE.problems(cfg, whole))


def test_evaluate_needs_something_to_do(chain: Chain) -> None:
    assert list(evaluate.check(EvaluateConfig(), chain)) == []
    assert one(evaluate.check(EvaluateConfig(prompt_tokens=256), chain)).rule.name == "evaluate"


def test_import_depends_on_a_local_folder_only(hf_folder: Path) -> None:
    assert import_hf.external(import_hf.ImportConfig(hf_path=str(hf_folder))) == {
        "hf_path": hf_folder
    }
    assert import_hf.external(import_hf.ImportConfig(hf_path="org/name")) == {}


def test_export_needs_the_size_of_the_teacher_at_most(chain: Chain) -> None:
    assert export_hf.disk_bytes(export_hf.ExportConfig(), chain) == 4 * chain.teacher.parameters()
