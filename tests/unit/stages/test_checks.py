"""The ``check`` functions of stages, and properties that every stage must have."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from huggingface_hub import constants

from launch.plan import with_shapes
from launch.planned import load_stage
from launch.schema import CONF
from recipes.core.files import write_json
from recipes.core.stage import Resources, StageConfig
from recipes.distillation.settings import CacheLogitsConfig, DistillConfig
from recipes.evaluation.settings import EvaluateConfig
from recipes.planning.chain import Chain
from recipes.planning.rules import Problem
from recipes.pruning.settings import HealConfig, PruneConfig, ScoreConfig
from recipes.report.settings import ReportConfig
from recipes.stages import (
    cache_logits,
    distill,
    evaluate,
    export_gguf,
    heal,
    import_hf,
    prune,
    report,
    score,
)
from recipes.stages.contract import Kind

STAGES = sorted(folder.name for folder in (CONF / "stage").iterdir())
TRAINING_RESOURCES = {
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "num_distributed_optimizer_instances",
    "sequence_parallel",
    "micro_batch_size",
    "max_nonfinite_steps",
    "checkpoint_interval",
    "keep_checkpoints",
    "recompute_granularity",
    "recompute_modules",
    "compile",
    "cpu_speed_patches",
    "profile_steps",
}
"""Settings that may be marked as resources, because they do not change results."""
OTHER_RESOURCES = {
    "prepare_data": {"processes"},
    "evaluate_served": {"port", "threads", "start_seconds"},
    "successive_halving": {"hardware"},  # only names the profile in the chosen recipe
}
TWO_RANKS = Resources(devices=2)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.jsonl").write_text('{"text": "x"}\n')
    return str(tmp_path / "text.jsonl")


def only_problem(problems: Any) -> Problem:
    [problem] = problems
    assert isinstance(problem, Problem)
    return problem


def rule_names(problems: Any) -> list[str]:
    return [problem.rule.name for problem in problems]


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_consistent(name: str, chain: Chain) -> None:
    stage = load_stage(name)
    assert issubclass(stage.config, StageConfig)
    assert not stage.optional_inputs.keys() & stage.inputs.keys()
    for kinds in [*stage.inputs.values(), *stage.optional_inputs.values()]:
        assert {stage.kind, *kinds} <= set(get_args(Kind))
    # The check of default settings may find problems, but raises no error.
    assert isinstance(list(stage.problems(stage.config(stage=name), chain)), list)
    fields = {f.name: bool(f.metadata.get("resource")) for f in dataclasses.fields(stage.config)}
    resource_fields = {field for field, is_resource in fields.items() if is_resource}
    common = {"inputs", "resources"}
    allowed = common | TRAINING_RESOURCES | OTHER_RESOURCES.get(name, set())
    assert common <= resource_fields <= allowed
    assert fields.get("micro_batch_size", True), "micro_batch_size must be a resource"


@pytest.mark.parametrize("name", ["import_hf", "prune", "export_hf"])
@pytest.mark.parametrize("resources", [TWO_RANKS, Resources(nodes=2)])
def test_stages_without_parallelism_need_one_rank(
    name: str, resources: Resources, chain: Chain
) -> None:
    stage = load_stage(name)
    assert "one-rank" in rule_names(
        stage.problems(stage.config(stage=name, resources=resources), chain)
    )


@pytest.mark.parametrize("stage", [score, distill, evaluate, cache_logits])
def test_sequences_must_fit_the_models_positions(stage: Any, chain: Chain) -> None:
    cfg = stage.STAGE.config(seq_length=1025)
    assert "seq-length" in rule_names(stage.check(cfg, chain))


def prune_errors(cfg: PruneConfig, chain: Chain) -> list[Problem]:
    """Returns the problems of a stage ``prune``, without the warning about a large reduction."""
    return [p for p in prune.check(cfg, chain) if p.rule.name != "large-reduction"]


def test_prune_reports_each_invalid_target(chain: Chain) -> None:
    """The teacher has hidden size 128 and feed-forward size 256; the divisors are 64."""
    good = PruneConfig(target_hidden_size=64, target_ffn_hidden_size=192, target_num_layers=2)
    assert prune_errors(good, chain) == []
    bad = replace(good, target_hidden_size=100, target_ffn_hidden_size=512)
    problems = prune_errors(bad, chain)
    assert len(problems) == 2
    assert any("target_hidden_size=100" in p.what for p in problems)
    assert prune_errors(replace(good, hidden_size_divisor=4), chain) == []
    assert PruneConfig(drop_layers=[3, 1]).targets(chain.teacher).drop_layers == (1, 3)


@pytest.mark.parametrize(
    ("targets", "fix"),
    [
        ({"target_num_layers": 0.9}, "below 4"),
        ({"target_num_layers": 0.1}, "below 4"),
        ({"target_hidden_size": 0.8}, "hidden_size_divisor"),
        ({"target_num_attention_heads": 0.2}, "below 8"),
    ],
)
def test_a_fraction_that_keeps_all_or_nothing_is_refused(
    chain: Chain, targets: dict[str, Any], fix: str
) -> None:
    """The teacher has 4 layers, 8 heads in 4 groups, and hidden size 128; the divisor is 64."""
    problem = only_problem(prune_errors(PruneConfig(**targets), chain))
    assert problem.rule.name == "prune-target"
    assert str(next(iter(targets.values()))) in problem.what
    assert fix in problem.fix


def test_pruning_more_than_a_third_at_once_gives_a_warning(chain: Chain) -> None:
    """Each of the teacher's 4 layers has 147,712 parameters."""
    total = chain.teacher.parameters()
    assert list(prune.check(PruneConfig(target_num_layers=3), chain)) == []
    warning = only_problem(prune.check(PruneConfig(target_num_layers=2), chain))
    assert f"{2 * 147_712 / total:.0%} " in warning.what
    assert "model.hf_path=" in warning.fix


@pytest.mark.parametrize(
    ("method", "setting", "fix"),
    [
        ("loss", {"num_loss_samples": 0}, "stages.score.num_loss_samples=8"),
        ("block", {"block_sizes": [1]}, "stages.score.block_sizes=[1,2]"),
    ],
)
def test_prune_requires_that_score_measures_its_layer_importance(
    chain: Chain, method: str, setting: dict[str, Any], fix: str
) -> None:
    cfg = PruneConfig(target_num_layers=2, layer_importance=method, inputs={"importance": "score"})

    def problems(**settings: Any) -> list[Problem]:
        return prune_errors(cfg, replace(chain, stages={"score": ScoreConfig(**settings)}))

    assert fix in only_problem(problems(**setting)).fix
    assert problems(num_loss_samples=4, block_sizes=[2]) == []


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
def test_score_measures_the_block_sizes_that_prune_drops(
    chain: Chain, settings: dict[str, Any], expected: list[int]
) -> None:
    settings = {"target_num_layers": 2, "inputs": {"importance": "score"}, **settings}
    stages = {"score": ScoreConfig("score"), "prune": PruneConfig("prune", **settings)}
    planned = with_shapes(replace(chain, stages=stages), stages)
    assert score.resolve_from_chain(stages["score"], planned).block_sizes == expected
    explicit = ScoreConfig(block_sizes=[3])
    assert score.resolve_from_chain(explicit, planned) is explicit


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"block_sizes": [4]}, "calibration"),
        ({"block_sizes": [1], "num_loss_samples": 0}, "calibration"),
        ({"pipeline_model_parallel_size": 2}, "ranks"),
        ({"resources": TWO_RANKS}, None),
        ({"resources": TWO_RANKS, "num_calibration_samples": 4}, "ranks"),  # micro batches of 4
        ({"resources": TWO_RANKS, "num_calibration_samples": 5}, None),
        ({"num_calibration_samples": 2}, None),
        ({"resources": Resources(devices=5), "pipeline_model_parallel_size": 5}, "ranks"),
        ({"resources": Resources(devices=4), "pipeline_model_parallel_size": 4}, None),
    ],
)
def test_score_checks_ablations_and_ranks(
    chain: Chain, settings: dict[str, Any], rule: str | None
) -> None:
    assert rule_names(score.check(ScoreConfig(**settings), chain)) == ([rule] if rule else [])


def test_heal_needs_a_dense_model_that_was_pruned_from_its_teacher(chain: Chain) -> None:
    pruned = PruneConfig(stage="prune", target_num_layers=3, inputs={"checkpoint": "import_hf"})
    chain = replace(chain, stages={"prune": pruned, "distill": DistillConfig()})
    inputs = {"checkpoint": "prune", "teacher": "import_hf", "data": "prepare_data"}
    cfg = HealConfig(stage="heal", inputs=inputs)
    assert list(heal.check(cfg, chain)) == []
    too_long = replace(cfg, seq_length=chain.teacher.max_position_embeddings + 1)
    assert rule_names(heal.check(too_long, chain)) == ["seq-length"]
    other_teacher = replace(cfg, inputs={**inputs, "teacher": "distill"})
    problem = only_problem(heal.check(other_teacher, chain))
    assert problem.fix == "set stages.heal.inputs.teacher=import_hf"
    unpruned = replace(cfg, inputs={**inputs, "checkpoint": "distill"})
    assert "inputs.checkpoint" in only_problem(heal.check(unpruned, chain)).fix
    moe = replace(chain.teacher, num_moe_experts=4, moe_ffn_hidden_size=64)
    assert "heal" in only_problem(heal.check(cfg, replace(chain, teacher=moe))).fix


def test_gguf_supports_some_families_and_tokenizers(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is in a folder, which is also the snapshot of a hub model in the cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("a" * 40)
    cfg = export_gguf.ExportGgufConfig(stage="export_gguf")
    assert list(export_gguf.check(cfg, chain)) == []
    moe = replace(chain.teacher, hf_architecture="Qwen3MoeForCausalLM")
    assert "gguf" in only_problem(export_gguf.check(cfg, replace(chain, teacher=moe))).fix
    bpe = {"type": "BPE", "merges": []}
    for model, pre_tokenizer, what in (
        (bpe, {"type": "ByteLevel"}, ""),
        (bpe, {"type": "Whitespace"}, "pre_tokenizer"),
        ({"type": "Unigram", "vocab": []}, None, "Unigram"),
        ("damaged", None, ""),  # import_hf reports it
    ):
        write_json(folder / "tokenizer.json", {"model": model, "pre_tokenizer": pre_tokenizer})
        for hf_path in (str(folder), "org/name"):
            problems = list(export_gguf.check(cfg, replace(chain, hf_path=hf_path)))
            assert [what in problem.what for problem in problems] == [True] * bool(what)
    assert list(export_gguf.check(cfg, replace(chain, hf_path="org/not-in-the-cache"))) == []


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (DistillConfig(), []),
        (DistillConfig(warmup_steps=100), ["schedule"]),
        (DistillConfig(min_lr=1e-3), ["schedule"]),
        (DistillConfig(global_batch_size=6), ["batch"]),
        (DistillConfig(tensor_model_parallel_size=2), ["ranks"]),
        (
            DistillConfig(max_steps=1, kd_weight=0.0, global_batch_size=3),
            ["schedule", "loss", "batch"],
        ),
        (CacheLogitsConfig(), ["unknown-text"]),
        (CacheLogitsConfig(num_sequences=8), []),
        (CacheLogitsConfig(num_sequences=8, top_k=512), ["top-k"]),
        (CacheLogitsConfig(num_sequences=8, tensor_model_parallel_size=2), ["ranks"]),
        # ``None`` expects at least one problem, of any rule.
        (CacheLogitsConfig(tensor_model_parallel_size=3, resources=Resources(devices=3)), None),
        (
            CacheLogitsConfig(
                num_sequences=8,
                tensor_model_parallel_size=2,
                resources=Resources(devices=8),
                micro_batch_size=3,
            ),
            [],
        ),
        (EvaluateConfig(), []),
        (EvaluateConfig(prompt_tokens=256), ["evaluate"]),
        (EvaluateConfig(num_sequences=1, resources=TWO_RANKS), ["ranks"]),
    ],
)
def test_all_problems_are_listed(
    chain: Chain, cfg: StageConfig, expected: list[str] | None
) -> None:
    stages = {
        DistillConfig: distill.STAGE,
        CacheLogitsConfig: cache_logits.STAGE,
        EvaluateConfig: evaluate.STAGE,
    }
    names = rule_names(stages[type(cfg)].problems(cfg, chain))
    assert names == expected if expected is not None else names


@pytest.mark.parametrize(
    ("target", "parallel_size"),
    [
        ({"target_num_layers": 1}, "pipeline_model_parallel_size"),
        ({"target_ffn_hidden_size": 129}, "tensor_model_parallel_size"),
    ],
)
def test_distill_checks_the_students_shape(
    chain: Chain, target: dict[str, int], parallel_size: str
) -> None:
    student = PruneConfig(stage="prune", ffn_hidden_size_divisor=1, **target)
    inputs = {"student": "prune"}
    cfg = DistillConfig(stage="distill", inputs=inputs, resources=TWO_RANKS, **{parallel_size: 2})
    stages = {"prune": student, "distill": cfg}
    planned = with_shapes(replace(chain, stages=stages), stages)
    assert list(distill.STAGE.problems(cfg, planned))


@pytest.mark.parametrize(
    ("inputs", "is_complete"),
    [
        (("search",), True),
        (report.DISTILLATION, True),
        (("search", *report.DISTILLATION), True),
        ((), False),
        (report.DISTILLATION[1:], False),
        (("search", *report.DISTILLATION[1:]), False),
    ],
)
def test_a_report_is_about_a_whole_distillation_or_a_search(
    chain: Chain, inputs: tuple[str, ...], is_complete: bool
) -> None:
    cfg = ReportConfig(stage="report", inputs={name: name for name in ("teacher", *inputs)})
    assert rule_names(report.check(cfg, chain)) == ([] if is_complete else ["report"])


def test_an_import_depends_on_local_files_only(hf_folder: Path) -> None:
    local, hub = (import_hf.ImportConfig(hf_path=path) for path in (str(hf_folder), "org/name"))
    assert import_hf.external(local) == {"hf_path": hf_folder}
    assert import_hf.external(hub) == {}
