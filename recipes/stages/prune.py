"""Prunes width and depth of a model by importance (Minitron, arXiv:2407.14679).

Reads a NeMo checkpoint and its importance scores. Writes the pruned checkpoint and the indices of
the layers, channels and heads that were kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError
from recipes.core.manifest import Outcome, manifest_of
from recipes.core.stage import Inputs
from recipes.distillation.results import KeptLayers
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.rules import Problem
from recipes.pruning.results import PruneResult, ScoreResult
from recipes.pruning.settings import PruneConfig, ScoreConfig, layer_score_problems
from recipes.pruning.targets import (
    MAX_FRACTION,
    fraction_problems,
    pruned_shape,
    searched_shape_problems,
    target_problems,
    transformers_5_problems,
)
from recipes.search.settings import RankCandidatesConfig, SuccessiveHalvingConfig
from recipes.search.space import SEARCH_AXES, name_of
from recipes.stages.contract import Stage, checkpoint_outcome

if TYPE_CHECKING:
    from recipes.pruning.kept import Importance


SCORED_AXES = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "layers.1.ffn_hidden_size",
    "num_attention_heads": "layers.1.num_attention_heads",
    "num_moe_experts": "layers.1.num_moe_experts",
    "moe_ffn_hidden_size": "layers.1.experts.0.moe_ffn_hidden_size",
}
"""Maps each axis to a key of ``Importance.widths`` with a score for each index of the axis."""


def student_of(cfg: PruneConfig, chain: Chain) -> Architecture:
    """Returns the student's shape; before a search has run, the largest that the search allows."""
    if "shape" in cfg.inputs:
        return chain.shape_of(cfg.inputs["shape"])
    return pruned_shape(chain.shape_of(cfg.inputs.get("checkpoint")), cfg.targets(chain.teacher))


def check(cfg: PruneConfig, chain: Chain) -> Iterator[Problem]:
    """Yields problems of the targets or the search, of missing scores and of a large reduction."""
    teacher, input_shape = chain.teacher, chain.shape_of(cfg.inputs.get("checkpoint"))
    student = student_of(cfg, chain)
    if "shape" in cfg.inputs:
        yield from _search_problems(cfg, chain, student)
    else:
        # Fractions are of the teacher's sizes. The input may be a smaller, already pruned model.
        divisors = cfg.divisors(teacher)
        problems = list(fraction_problems(teacher, cfg.explicit_targets(), divisors))
        if not problems:  # sizes can be computed only from valid fractions
            problems = list(target_problems(input_shape, cfg.targets(teacher), divisors))
        yield from problems or transformers_5_problems(cfg.name, student)
    if not cfg.drop_layers:
        yield from _score_problems(cfg, chain, input_shape.num_layers - student.num_layers)
    removed_fraction = 1 - student.parameters() / input_shape.parameters()
    if removed_fraction > MAX_FRACTION:  # more than one distillation can recover well
        yield Problem(
            rules.LARGE_REDUCTION,
            f"{cfg.name} removes {removed_fraction:.0%} of the parameters at once",
            "prune less, or distil a larger student and prune it again in a second run: "
            "model.hf_path=FIRST_RUN/export_hf/artifact",
        )


def _search_problems(cfg: PruneConfig, chain: Chain, student: Architecture) -> Iterator[Problem]:
    """Checks the input ``shape``: a search of this run or the directory of a completed search.

    If the search is in this run, a note says which shape the plan is for.
    """
    source = cfg.inputs["shape"]
    if cfg.explicit_targets() or cfg.drop_layers:
        yield Problem(
            rules.PRUNE_TARGET,
            f"{cfg.name} has both targets and the result of a search ({source})",
            f"remove the targets, or the input with '~stages.{cfg.name}.inputs.shape'",
        )
    search = chain.stages.get(source)  # ``None`` if ``source`` is a directory
    manifest = manifest_of(source)  # ``None`` if ``source`` is a stage or an unfinished search
    if isinstance(search, SuccessiveHalvingConfig):
        ranking = chain.stages.get(search.inputs.get("candidates", ""))
        if isinstance(ranking, RankCandidatesConfig):
            other_fix = f", or stages.{ranking.name}.layer_importance={cfg.layer_importance}"
            yield from _method_problems(cfg, ranking.name, ranking.layer_importance, other_fix)
        shapes = chain.shapes.get(source, ())
        shape = f"the largest shape of {len(shapes)}" if shapes else "the teacher's shape"
        size = f"{name_of(student)} with {student.parameters() / 1e6:,.0f} M parameters"
        yield Problem(
            rules.SEARCHED_SHAPE,
            f"{source} chooses the shape when it runs, so the plan is for {shape}: {size}",
            "read the plan as an estimate: another shape may need a few percent more time",
        )
    elif search is not None or manifest is None or manifest.architecture is None:
        yield Problem(
            rules.PRUNE_TARGET,
            f"{source} did not choose an architecture",
            f"set stages.{cfg.name}.inputs.shape to a successive_halving stage, or run it again",
        )
    else:
        yield from _shape_problems(source, student, chain.shape_of(cfg.inputs.get("checkpoint")))
        yield from searched_shape_problems(source, [student])
        # The stage that ranked the candidates is in the same run directory as the search.
        ranking_name = manifest.config.get("inputs", {}).get("candidates")
        ranking_dir = str(Path(source).parent / ranking_name) if ranking_name else ""
        if (ranking_manifest := manifest_of(ranking_dir)) is not None:
            method = ranking_manifest.config["layer_importance"]
            yield from _method_problems(cfg, ranking_name, method)


def _shape_problems(
    source: str, student: Architecture, input_shape: Architecture
) -> Iterator[Problem]:
    """Checks that a model can be pruned to the shape that a search of another run chose.

    On the search's axes, sizes may be smaller than the model's. All other sizes must be equal.
    """
    for axis, size in vars(student).items():
        input_size = vars(input_shape)[axis]
        is_possible = size <= input_size if axis in SEARCH_AXES else size == input_size
        if not is_possible:
            yield Problem(
                rules.PRUNE_TARGET,
                f"the shape of {source} has {axis}={size}, but the model to prune has {input_size}",
                "use the shape of a search for this model, or set model.hf_path to that search's",
            )


def _method_problems(
    cfg: PruneConfig, ranking: str, method: str, other_fix: str = ""
) -> Iterator[Problem]:
    """Checks that this stage chooses layers by the same method as the search.

    ``ranking`` is the name of the stage that ranked the candidates, and ``method`` its
    ``layer_importance``. ``other_fix`` is appended to the fix that changes this stage.
    """
    if cfg.layer_importance != method:
        yield Problem(
            rules.LAYER_IMPORTANCE,
            f"{cfg.name} has layer_importance={cfg.layer_importance}, but {ranking}, which ranked "
            f"the candidates, has {method}",
            f"set stages.{cfg.name}.layer_importance={method}{other_fix}",
        )


def _score_problems(cfg: PruneConfig, chain: Chain, num_dropped: int) -> Iterator[Problem]:
    """Checks that the scores are of the right shape and suffice to drop ``num_dropped`` layers."""
    score = chain.stages.get(cfg.inputs.get("importance", ""))
    # ``None`` for scores of another run, which ``run`` checks.
    scored_model = score.inputs.get("checkpoint") if score else None
    model = cfg.inputs.get("checkpoint")
    if scored_model and chain.shape_of(scored_model) != chain.shape_of(model):
        yield Problem(
            rules.LAYER_IMPORTANCE,
            f"{cfg.name} prunes {model}, but {cfg.inputs['importance']} scored {scored_model}, "
            "which has other sizes",
            f"add another score stage with inputs.checkpoint={model}, and name it in "
            f"stages.{cfg.name}.inputs.importance",
        )
    # Without ``block_sizes``, ``score`` measures the blocks that the stages of this run drop.
    is_automatic = isinstance(score, ScoreConfig) and score.block_sizes is None
    if num_dropped > 0 and not (cfg.layer_importance == "block" and is_automatic):
        yield from layer_score_problems(cfg, cfg.layer_importance, [num_dropped], chain)


def run(cfg: PruneConfig, inputs: Inputs, out: Path) -> Outcome:
    """Chooses layers, channels and heads; saves the pruned model and the indices that it keeps."""
    from nemo_convert import nemo
    from recipes.pruning.kept import importance_of, layers_to_keep, select_indices
    from recipes.pruning.pruned_checkpoint import prune_weights, save_weights

    source = nemo.find_checkpoint(inputs["checkpoint"].artifact)
    importance = importance_of(inputs)
    input_shape = nemo.architecture_of(source)
    _require_scores_of(input_shape, importance, inputs["importance"].directory)
    if "shape" in inputs:
        student = Architecture(**(inputs["shape"].manifest.architecture or {}))
    else:
        # ``resolve_from_chain`` has replaced fractions of the teacher's sizes by numbers.
        student = pruned_shape(input_shape, cfg.targets(input_shape))
    if cfg.drop_layers:
        all_layers = range(1, input_shape.num_layers + 1)
        layers = [layer for layer in all_layers if layer not in cfg.drop_layers]
    else:
        layers = layers_to_keep(importance, cfg.layer_importance, student.num_layers)
    kept = select_indices(importance.widths, input_shape, student, layers)

    checkpoint = out / source.name
    save_weights(source, student, prune_weights(source, kept, student.kv_channels), checkpoint)
    kept.save(out)
    score = inputs["importance"].manifest.result(ScoreResult)
    measured_method, layer_scores = importance.layer_scores(cfg.layer_importance)
    # The result numbers layers as in the model before all pruning. The input may be pruned, too.
    kept_before = inputs["checkpoint"].manifest.result(KeptLayers).kept_layers
    layers_before = kept_before or range(1, input_shape.num_layers + 1)
    original_number = dict(enumerate(layers_before, start=1))  # by number in the input
    result = PruneResult(
        kept_layers=[original_number[layer] for layer in kept.layers],
        layer_importance={original_number[layer]: value for layer, value in layer_scores.items()},
        layer_measure=measured_method,
        calibration_tokens=score.calibration_tokens,
        calibration_sequences=score.calibration_sequences,
        teacher_parameters=inputs["checkpoint"].manifest.parameters,
    )
    return checkpoint_outcome(result, checkpoint)


def _require_scores_of(model: Architecture, importance: Importance, directory: Path) -> None:
    """Raises ``RecipeError`` if the scores are of a model with other sizes than ``model``.

    ``directory`` is the directory of the ``score`` stage, for the message.
    """
    scored_sizes = {"num_layers": len(importance.layers["block_influence"])}
    for axis, key in SCORED_AXES.items():
        if key in importance.widths:
            scored_sizes[axis] = len(importance.widths[key])
    for axis, size in scored_sizes.items():
        if size != vars(model)[axis]:
            raise RecipeError(
                f"the scores in {directory} are of a model with {axis}={size}, but the model to "
                f"prune has {vars(model)[axis]}.",
                "score the model that is pruned: set inputs.checkpoint of the score stage to it",
            )


STAGE = Stage(
    config=PruneConfig,
    kind="checkpoint_nemo",
    run=run,
    check=check,
    single_rank_reason="the stage only copies weights",
    inputs={"checkpoint": ("checkpoint_nemo",), "importance": ("importance",)},
    optional_inputs={"shape": ("search_results",)},
    # All shapes that a search may choose; without a search, the only shape.
    shapes=lambda config, chain: (
        chain.shapes.get(config.inputs.get("shape", "")) or [student_of(config, chain)]
    ),
    disk_bytes=lambda config, chain: 4 * student_of(config, chain).parameters(),  # if float32
    resolve_from_chain=lambda config, chain: config.with_absolute_targets(chain.teacher),
)
