"""The ``check`` functions of stages, and properties that every stage must have.

The teacher of ``chain`` has 4 layers, 8 heads in 4 groups, hidden size 128, feed-forward size 256,
a vocabulary of 512 and 1024 positions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from huggingface_hub import constants

from launch.planned import load_stage
from launch.schema import CONF
from launch.stages import with_shapes
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
"""Names of all stages."""
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
"""Settings that any stage may mark as resources, because they do not change results."""
OTHER_RESOURCES = {
    "prepare_data": {"processes"},
    "evaluate_served": {"port", "threads", "start_seconds"},
    "successive_halving": {"hardware"},  # only names the profile in the chosen recipe
}
"""Further settings of a stage that may be marked as resources, by stage."""
TWO_RANKS = Resources(devices=2)


def only_problem(problems: Any) -> Problem:
    """Returns the only element of ``problems``; fails if there are several or none."""
    [problem] = problems
    assert isinstance(problem, Problem)
    return problem


def rule_names(problems: Any) -> list[str]:
    return [problem.rule.name for problem in problems]


def parallel_size(tensor: int, devices: int) -> dict[str, Any]:
    """Returns settings of tensor parallelism."""
    return {"tensor_model_parallel_size": tensor, "resources": Resources(devices=devices)}


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_consistent(name: str, chain: Chain) -> None:
    stage = load_stage(name)
    assert issubclass(stage.config, StageConfig)
    assert not stage.optional_inputs.keys() & stage.inputs.keys()
    for kinds in [*stage.inputs.values(), *stage.optional_inputs.values()]:
        assert {stage.kind, *kinds} <= set(get_args(Kind))
    # The check of default settings may find problems, but raises no error.
    list(stage.problems(stage.config(stage=name), chain))
    is_resource = {
        field.name: bool(field.metadata.get("resource"))
        for field in dataclasses.fields(stage.config)
    }
    resource_fields = {field for field, marked in is_resource.items() if marked}
    common = {"inputs", "resources"}
    allowed = common | TRAINING_RESOURCES | OTHER_RESOURCES.get(name, set())
    assert common <= resource_fields <= allowed
    # Stages without this setting pass. It changes the scores of an MoE's experts.
    assert is_resource.get("micro_batch_size", True) == (name != "score")


@pytest.mark.parametrize("name", ["import_hf", "prune", "export_hf"])
@pytest.mark.parametrize("resources", [TWO_RANKS, Resources(nodes=2)])
def test_stages_without_parallelism_need_one_rank(
    name: str, resources: Resources, chain: Chain
) -> None:
    stage = load_stage(name)
    cfg = stage.config(stage=name, resources=resources)
    assert "one-rank" in rule_names(stage.problems(cfg, chain))


@pytest.mark.parametrize("stage", [score, distill, evaluate, cache_logits])
def test_sequences_must_fit_the_models_positions(stage: Any, chain: Chain) -> None:
    cfg = stage.STAGE.config(seq_length=1025)  # one more than the teacher's positions
    assert "seq-length" in rule_names(stage.check(cfg, chain))


def prune_errors(cfg: PruneConfig, chain: Chain) -> list[Problem]:
    """Returns the problems of a stage ``prune``, without the warning about a large reduction."""
    return [p for p in prune.check(cfg, chain) if p.rule.name != "large-reduction"]


def test_prune_reports_each_invalid_target(chain: Chain) -> None:
    """The default divisors are 64."""
    good = PruneConfig(target_hidden_size=64, target_ffn_hidden_size=192, target_num_layers=2)
    assert prune_errors(good, chain) == []
    # 100 is not a multiple of 64, and 512 is more than the teacher's 256.
    bad = replace(good, target_hidden_size=100, target_ffn_hidden_size=512)
    problems = prune_errors(bad, chain)
    assert len(problems) == 2
    assert any("target_hidden_size=100" in p.what for p in problems)
    assert prune_errors(replace(good, hidden_size_divisor=4), chain) == []
    # Layers to drop are sorted.
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
    """Fractions are rounded to whole layers, multiples of 64 channels, and heads of all groups."""
    problem = only_problem(prune_errors(PruneConfig(**targets), chain))
    assert problem.rule.name == "prune-target"
    assert str(next(iter(targets.values()))) in problem.what
    assert fix in problem.fix


def test_pruning_more_than_a_third_at_once_gives_a_warning(chain: Chain) -> None:
    """A layer has 147,712 parameters. One of 4 layers is less than a third, two are more.

    Embeddings and the final norm are the rest of the parameters.
    """
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
    """By default, ``prune`` drops 2 of 4 layers here. ``expected`` is ``score``'s block_sizes."""
    settings = {"target_num_layers": 2, "inputs": {"importance": "score"}, **settings}
    stages = {"score": ScoreConfig("score"), "prune": PruneConfig("prune", **settings)}
    chain = with_shapes(replace(chain, stages=stages), stages)
    assert score.resolve_from_chain(stages["score"], chain).block_sizes == expected
    explicit = ScoreConfig(block_sizes=[3])
    assert score.resolve_from_chain(explicit, chain) is explicit


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"block_sizes": [4]}, "calibration"),  # all layers
        ({"block_sizes": [1], "num_loss_samples": 0}, "calibration"),
        ({"pipeline_model_parallel_size": 2}, "ranks"),  # on one rank
        ({"resources": TWO_RANKS}, None),
        # A micro batch has 4 samples. Each data-parallel rank needs a micro batch.
        ({"resources": TWO_RANKS, "num_calibration_samples": 4}, "ranks"),
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
    """Reads the same tokenizer in two ways: as a local folder, and as a cached hub model.

    The folder is the snapshot of the model ``org/name`` in the hub's cache.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached_model, commit = tmp_path / "models--org--name", "a" * 40
    folder = cached_model / "snapshots" / commit
    folder.mkdir(parents=True)
    (cached_model / "refs").mkdir()
    (cached_model / "refs" / "main").write_text(commit)
    cfg = export_gguf.ExportGgufConfig(stage="export_gguf")
    assert list(export_gguf.check(cfg, chain)) == []
    moe = replace(chain.teacher, hf_architecture="Qwen3MoeForCausalLM")
    assert "gguf" in only_problem(export_gguf.check(cfg, replace(chain, teacher=moe))).fix
    bpe = {"type": "BPE", "merges": []}
    for model, pre_tokenizer, message in (  # no message: no problem
        (bpe, {"type": "ByteLevel"}, ""),
        (bpe, {"type": "Whitespace"}, "pre_tokenizer"),
        ({**bpe, "dropout": 0.1}, {"type": "ByteLevel"}, "dropout"),
        ({"type": "Unigram", "vocab": []}, None, "Unigram"),
        ("damaged", None, ""),  # the check of import_hf reports a damaged file
    ):
        write_json(folder / "tokenizer.json", {"model": model, "pre_tokenizer": pre_tokenizer})
        for hf_path in (str(folder), "org/name"):
            problems = list(export_gguf.check(cfg, replace(chain, hf_path=hf_path)))
            assert len(problems) == bool(message)
            assert all(message in problem.what for problem in problems)
    assert list(export_gguf.check(cfg, replace(chain, hf_path="org/not-in-the-cache"))) == []
    write_json(folder / "config.json", {"rope_theta": 1e39})
    problem = only_problem(export_gguf.check(cfg, replace(chain, hf_path=str(folder))))
    assert "rope_theta=1e+39" in problem.what


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (DistillConfig(), []),
        (DistillConfig(min_lr=1e-3), ["schedule"]),  # more than ``lr``
        (
            DistillConfig(max_steps=1, kd_weight=0.0, global_batch_size=3),
            ["schedule", "loss", "batch"],
        ),
        # Without ``num_sequences``, the whole text is cached, and its length is not known.
        (CacheLogitsConfig(), ["unknown-text"]),
        (CacheLogitsConfig(num_sequences=8), []),
        (CacheLogitsConfig(num_sequences=8, top_k=512), ["top-k"]),  # the whole vocabulary
        (CacheLogitsConfig(num_sequences=8, tensor_model_parallel_size=2), ["ranks"]),
        (  # 3 ranks cannot share 8 heads, 4 groups, 256 feed-forward channels and 512 tokens
            CacheLogitsConfig(num_sequences=8, **parallel_size(3, devices=3)),
            [*["tensor-parallel"] * 3, "vocabulary"],
        ),
        (CacheLogitsConfig(num_sequences=8, micro_batch_size=3, **parallel_size(2, devices=8)), []),
        (EvaluateConfig(), []),
        (EvaluateConfig(prompt_tokens=256), ["evaluate"]),  # the whole sequence
        (EvaluateConfig(num_sequences=1, resources=TWO_RANKS), ["ranks"]),
    ],
)
def test_all_problems_are_listed(chain: Chain, cfg: StageConfig, expected: list[str]) -> None:
    stages = {
        DistillConfig: distill.STAGE,
        CacheLogitsConfig: cache_logits.STAGE,
        EvaluateConfig: evaluate.STAGE,
    }
    assert rule_names(stages[type(cfg)].problems(cfg, chain)) == expected


@pytest.mark.parametrize(
    ("target", "parallel_size"),
    [
        # Two ranks cannot share one layer, or 129 channels.
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
    chain = with_shapes(replace(chain, stages=stages), stages)
    assert list(distill.STAGE.problems(cfg, chain))


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
    """Of ``report.DISTILLATION``, a report needs all inputs, or, if it has a search, none."""
    cfg = ReportConfig(stage="report", inputs={name: name for name in ("teacher", *inputs)})
    assert rule_names(report.check(cfg, chain)) == ([] if is_complete else ["report"])


def test_an_import_depends_on_local_files_only(hf_folder: Path) -> None:
    """``external`` returns the paths outside the run whose content is in the fingerprint."""
    local, hub = (import_hf.ImportConfig(hf_path=path) for path in (str(hf_folder), "org/name"))
    assert import_hf.STAGE.external(local) == {"hf_path": hf_folder}
    assert import_hf.STAGE.external(hub) == {}
