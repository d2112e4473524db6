"""Reconstructs (heals) a pruned model by least squares, so that it approximates the teacher.

Reads the pruned model, its teacher, and calibration and validation text. Writes the reconstructed
checkpoint. Measures the KL to the teacher on validation text, before and after reconstruction.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from recipes.core.errors import RecipeError
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.distillation.results import KeptLayers
from recipes.planning import rules
from recipes.planning.chain import Chain, sequence_problems
from recipes.planning.inference_cost import (
    InferenceCost,
    Sequences,
    comparison_cost,
    healing_cost,
)
from recipes.planning.rules import Problem
from recipes.planning.transformer import largest
from recipes.pruning.results import HealResult
from recipes.pruning.settings import HealConfig, PruneConfig
from recipes.stages.contract import Stage, checkpoint_outcome


def check(cfg: HealConfig, chain: Chain) -> Iterator[Problem]:
    """Checks ``seq_length``, and that the model is dense and was pruned from the teacher."""
    yield from sequence_problems(cfg.seq_length, cfg.inputs, chain)
    if chain.teacher.num_moe_experts:
        yield Problem(rules.HEALING, f"{cfg.name} does not support MoE models", "set heal=null")
    stage = chain.stages.get(cfg.inputs.get("checkpoint", ""))
    if stage is None:  # of another run: ``_require_pruned_from_teacher`` checks it later
        return
    source, teacher = stage.inputs.get("checkpoint"), cfg.inputs.get("teacher")
    if not isinstance(stage, PruneConfig):
        yield Problem(
            rules.HEALING,
            f"the checkpoint of {cfg.name} comes from the stage {cfg.inputs['checkpoint']}, which "
            "does not prune",
            f"set stages.{cfg.name}.inputs.checkpoint to a stage that prunes",
        )
    elif source != teacher:
        yield Problem(
            rules.HEALING,
            f"the teacher of {cfg.name} is {teacher}, but its student was pruned from {source}",
            f"set stages.{cfg.name}.inputs.teacher={source}",
        )


def inference_cost(cfg: HealConfig, chain: Chain) -> InferenceCost:
    """Estimates the cost of healing, and of comparing pruned and healed model with the teacher."""
    teacher, student = (chain.shape_of(cfg.inputs.get(name)) for name in ("teacher", "checkpoint"))
    calibration, validation = (
        Sequences(count, cfg.seq_length, cfg.micro_batch_size)
        for count in (cfg.num_calibration_samples, cfg.num_samples)
    )
    bf16 = cfg.precision == "bf16-mixed"
    healing = healing_cost(teacher, student, calibration, chain.hardware)
    comparison = comparison_cost((teacher, student), bf16, validation, chain.hardware)
    # ``comparison`` includes the pruned student. The healed student needs the same forward passes.
    compute = healing.compute + comparison.compute + validation.compute(student, bf16)
    # All FLOPs count as float32, because healing runs in float32 and takes most of the time.
    return InferenceCost(largest(healing.memory, comparison.memory), compute, bf16=False)


def run(cfg: HealConfig, inputs: Inputs, out: Path) -> Outcome:
    """Reconstructs and saves the model. Measures the KL to the teacher before and afterwards."""
    from nemo_convert import nemo
    from nemo_convert.convert import hf_weights
    from recipes.data.token_sequences import read_sequences
    from recipes.evaluation.text_quality import measure_checkpoints
    from recipes.pruning.healing import heal_weights
    from recipes.pruning.kept import KeptIndices
    from recipes.pruning.pruned_checkpoint import save_weights

    _require_pruned_from_teacher(inputs)
    teacher, pruned = (
        nemo.find_checkpoint(inputs[name].artifact) for name in ("teacher", "checkpoint")
    )
    student, weights = nemo.architecture_of(pruned), dict(hf_weights(pruned))
    data, length = inputs["data"], cfg.seq_length
    validation = read_sequences(data, "validation", length, cfg.num_samples)
    calibration = read_sequences(data, "calibration", length, cfg.num_calibration_samples)
    batches = calibration.tokens.split(cfg.micro_batch_size)
    kept = KeptIndices.load(inputs["checkpoint"].artifact)
    progress = partial(metrics_log(out).progress, "heal")
    heal_weights(teacher, student, kept, weights, batches, progress)  # changes ``weights``
    save_weights(pruned, student, weights, out / pruned.name)
    del weights  # frees memory for the comparison
    students = [pruned, out / pruned.name]
    before, after = measure_checkpoints(
        teacher, students, validation, cfg.precision, cfg.micro_batch_size
    )
    result = HealResult(
        kept_layers=inputs["checkpoint"].manifest.result(KeptLayers).kept_layers,
        calibration_tokens=calibration.tokens.numel(),
        kl_pruned=before.kl_to_teacher,
        kl_healed=after.kl_to_teacher,
    )
    return checkpoint_outcome(result, pruned)  # healing keeps architecture and tokenizer


def _require_pruned_from_teacher(inputs: Inputs) -> None:
    """Raises ``RecipeError`` if the checkpoint was not pruned, or not from the teacher.

    This covers inputs of other runs, which ``check`` does not know.
    """
    from recipes.pruning.kept import KEPT_FILE

    pruned, teacher = inputs["checkpoint"], inputs["teacher"]
    # In the same run, fingerprints may differ: with ``accept``, the user keeps the pruned model
    # although the teacher has changed.
    is_same_run = pruned.directory.parent == teacher.directory.parent
    is_of_teacher = pruned.manifest.inputs.get("checkpoint") == teacher.manifest.fingerprint
    is_pruned = (pruned.artifact / KEPT_FILE).exists()
    if not (is_pruned and (is_same_run or is_of_teacher)):
        raise RecipeError(
            f"{pruned.directory} was not pruned from {teacher.directory}.",
            "set the inputs checkpoint and teacher of this stage to a result of prune and to the "
            "model that it pruned",
        )


STAGE = Stage(
    config=HealConfig,
    kind="checkpoint_nemo",
    run=run,
    check=check,
    inference_cost=inference_cost,
    single_rank_reason="layers are reconstructed one after another",
    inputs={
        "checkpoint": ("checkpoint_nemo",),
        "teacher": ("checkpoint_nemo",),
        "data": ("dataset",),
    },
    # Upper bound: float32 weights have 4 bytes per parameter.
    disk_bytes=lambda config, chain: 4 * chain.shape_of(config.inputs["checkpoint"]).parameters(),
)
