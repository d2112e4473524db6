"""Adds layers of the teacher to a distilled student, without training.

Reads the student, its teacher and held-out text. Measures a model of each number of layers between
student and teacher, and writes one of them as a NeMo checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.distillation.results import KeptLayers
from recipes.evaluation.results import AddLayersResult
from recipes.planning import rules
from recipes.planning.chain import Chain, sequence_problems
from recipes.planning.inference_cost import InferenceCost, Sequences, ranking_cost
from recipes.planning.rules import Problem
from recipes.pruning.settings import AddLayersConfig, PruneConfig
from recipes.stages.contract import Stage, checkpoint_outcome


def check(cfg: AddLayersConfig, chain: Chain) -> Iterator[Problem]:
    """Checks the origin of the student, and that the number of layers is between both models."""
    yield from sequence_problems(cfg.seq_length, cfg.inputs, chain)
    source = cfg.inputs.get("teacher")
    pruned = pruned_model(cfg.inputs.get("student", ""), chain)
    if pruned not in (None, source):
        yield Problem(
            rules.ADDED_LAYERS,
            f"the teacher of {cfg.name} is {source}, but its student "
            + (f"was pruned from {pruned}" if pruned else "was not pruned"),
            f"set stages.{cfg.name}.inputs.teacher={pruned}" if pruned else "set add_layers=null",
        )
        return
    teacher, student = models(cfg, chain)
    if replace(student, num_layers=teacher.num_layers) != teacher:
        yield Problem(
            rules.ADDED_LAYERS,
            f"the student of {cfg.name} was also pruned in width",
            "set add_layers=null, or prune only layers",
        )
    elif teacher.num_layers == student.num_layers:
        yield Problem(
            rules.ADDED_LAYERS,
            f"the student of {cfg.name} has all {teacher.num_layers} layers of its teacher",
            "set add_layers=null, or drop layers: stages.prune.target_num_layers=N",
        )
    elif not student.num_layers < cfg.size(student, teacher) < teacher.num_layers:
        between = range(student.num_layers + 1, teacher.num_layers)
        fix = f"set stages.{cfg.name}.num_layers to one of {list(between)}"
        yield Problem(
            rules.ADDED_LAYERS,
            f"{cfg.name}: {cfg.size(student, teacher)} layers are not between the student's "
            f"{student.num_layers} and the teacher's {teacher.num_layers}",
            fix if between else "set add_layers=null",
        )


def pruned_model(student: str, chain: Chain) -> str | None:
    """Returns the model that was pruned to the student: a stage or a directory.

    Returns an empty text if none was pruned, and ``None`` for a student of another run.
    """
    name = student
    while (config := chain.stages.get(name)) is not None:
        if isinstance(config, PruneConfig):
            return config.inputs.get("checkpoint")
        name = config.inputs.get("student") or config.inputs.get("checkpoint") or ""
    return None if name else ""


def models(cfg: AddLayersConfig, chain: Chain) -> tuple[Architecture, Architecture]:
    """Returns the shapes of the teacher and of the student."""
    return chain.shape_of(cfg.inputs.get("teacher")), chain.shape_of(cfg.inputs.get("student"))


def result_shape(cfg: AddLayersConfig, chain: Chain) -> Architecture:
    """Returns the shape of the model that is written."""
    teacher, student = models(cfg, chain)
    return replace(teacher, num_layers=cfg.size(student, teacher))


def inference_cost(cfg: AddLayersConfig, chain: Chain) -> InferenceCost:
    """Estimates the cost of measuring all sizes.

    A student and the layers that it lacks take as much memory as the teacher.
    """
    teacher, student = models(cfg, chain)
    text = Sequences(cfg.num_sequences, cfg.seq_length, cfg.micro_batch_size)
    bf16 = cfg.precision == "bf16-mixed"
    # As for a healed candidate, the teacher's head is counted in addition to one model.
    cost = ranking_cost(teacher, bf16, text, chain.hardware, healed=True)
    shapes = [replace(teacher, num_layers=n) for n in range(student.num_layers, teacher.num_layers)]
    return replace(cost, compute=sum((text.compute(s, bf16) for s in shapes), cost.compute))


def run(cfg: AddLayersConfig, inputs: Inputs, out: Path) -> Outcome:
    """Measures all sizes, and writes the model with ``num_layers`` layers."""
    from nemo_convert import nemo
    from recipes.data.token_sequences import read_sequences
    from recipes.pruning.added_layers import (
        combine_weights,
        layers_by_size,
        layers_of_student,
        measure_sizes,
    )
    from recipes.pruning.pruned_checkpoint import save_weights

    _require_origin(inputs)
    student, teacher = (nemo.find_checkpoint(inputs[n].artifact) for n in ("student", "teacher"))
    shape, full = nemo.architecture_of(student), nemo.architecture_of(teacher)
    kept_before, student_layers = (
        inputs[name].manifest.result(KeptLayers).kept_layers for name in ("teacher", "student")
    )
    # If the teacher was itself pruned, results number layers as in the model before all pruning.
    numbers = kept_before or list(range(1, full.num_layers + 1))
    kept = layers_of_student(student_layers, numbers)
    text = read_sequences(inputs["data"], "heldout", cfg.seq_length, cfg.num_sequences)
    progress = partial(metrics_log(out).progress, "measure")
    sizes = measure_sizes(cfg, student, teacher, kept, text, progress)
    layers = layers_by_size(kept, full.num_layers)[cfg.size(shape, full) - len(kept)]
    weights = combine_weights(student, teacher, kept, layers)
    checkpoint = out / teacher.name
    # Saved with the student's data type: a float32 student of a bfloat16 teacher is not rounded.
    save_weights(student, replace(full, num_layers=len(layers)), weights, checkpoint)
    result = AddLayersResult(
        kept_layers=[numbers[layer - 1] for layer in layers],
        added_layers=[numbers[layer - 1] for layer in layers if layer not in kept],
        sizes=sizes,
        teacher_layers=full.num_layers,
        teacher_parameters=full.parameters(),
        tokens=text.tokens.numel(),
    )
    return checkpoint_outcome(result, checkpoint)


def _require_origin(inputs: Inputs) -> None:
    """Raises ``RecipeError`` if the student was pruned from another model than the teacher."""
    from recipes.report.upstream import upstream

    student, teacher = inputs["student"].manifest, inputs["teacher"].manifest
    for manifest in (student, *upstream({"student": inputs["student"]}).values()):
        if manifest.stage == "prune" and manifest.inputs["checkpoint"] != teacher.fingerprint:
            raise RecipeError(
                f"{inputs['student'].directory} was not pruned from {inputs['teacher'].directory}.",
                "set the input teacher of add_layers to the model that was pruned",
            )


STAGE = Stage(
    config=AddLayersConfig,
    kind="checkpoint_nemo",
    run=run,
    check=check,
    inference_cost=inference_cost,
    single_rank_reason="the text is not split over ranks",
    inputs={
        "teacher": ("checkpoint_nemo",),
        "student": ("checkpoint_nemo",),
        "data": ("dataset",),
    },
    shapes=lambda config, chain: [result_shape(config, chain)],
    disk_bytes=lambda config, chain: 4 * result_shape(config, chain).parameters(),
)
