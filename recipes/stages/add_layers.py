"""Adds layers of the teacher to a distilled student, without training.

Reads the student, its teacher and held-out text. Measures a model of each size: from the student's
number of layers to one less than the teacher's. Writes the model of the configured size as a NeMo
checkpoint.
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
    """Checks the size, and that the student was pruned from the teacher, and only in depth."""
    yield from sequence_problems(cfg.seq_length, cfg.inputs, chain)
    teacher_source = cfg.inputs.get("teacher")
    origin = pruned_model(cfg.inputs.get("student", ""), chain)
    if origin not in (None, teacher_source):  # ``run`` checks a student of another run
        yield Problem(
            rules.ADDED_LAYERS,
            f"the teacher of {cfg.name} is {teacher_source}, but its student "
            + (f"was pruned from {origin}" if origin else "was not pruned"),
            f"set stages.{cfg.name}.inputs.teacher={origin}" if origin else "set add_layers=null",
        )
        return
    teacher, student = models(cfg, chain)
    size = cfg.size(student, teacher)
    differs_in_width = replace(student, num_layers=teacher.num_layers) != teacher
    if differs_in_width:
        what = f"the student of {cfg.name} was also pruned in width"
        yield Problem(rules.ADDED_LAYERS, what, "set add_layers=null, or prune only layers")
    elif teacher.num_layers == student.num_layers:
        yield Problem(
            rules.ADDED_LAYERS,
            f"the student of {cfg.name} has all {teacher.num_layers} layers of its teacher",
            "set add_layers=null, or drop layers: stages.prune.target_num_layers=N",
        )
    elif not student.num_layers < size < teacher.num_layers:
        valid_sizes = list(range(student.num_layers + 1, teacher.num_layers))
        fix = f"set stages.{cfg.name}.num_layers to one of {valid_sizes}"
        yield Problem(
            rules.ADDED_LAYERS,
            f"{cfg.name}: {size} layers are not between the student's {student.num_layers} and the "
            f"teacher's {teacher.num_layers}",
            fix if valid_sizes else "set add_layers=null",
        )


def pruned_model(student: str, chain: Chain) -> str | None:
    """Follows a student's inputs back to the model from which it was pruned.

    ``student`` is the stage that provides the student, or its directory in another run.

    Returns:
        The model's stage or directory; an empty string if the student was not pruned; ``None`` if
        the student comes from another run.
    """
    source = student
    while (config := chain.stages.get(source)) is not None:
        if isinstance(config, PruneConfig):
            return config.inputs.get("checkpoint")
        source = config.inputs.get("student") or config.inputs.get("checkpoint") or ""
    return None if source else ""  # a source that is not a stage is a directory


def models(cfg: AddLayersConfig, chain: Chain) -> tuple[Architecture, Architecture]:
    """Returns the shape of the teacher, then that of the student."""
    return chain.shape_of(cfg.inputs.get("teacher")), chain.shape_of(cfg.inputs.get("student"))


def result_shape(cfg: AddLayersConfig, chain: Chain) -> Architecture:
    """Returns the shape of the model that is written."""
    teacher, student = models(cfg, chain)
    return replace(teacher, num_layers=cfg.size(student, teacher))


def inference_cost(cfg: AddLayersConfig, chain: Chain) -> InferenceCost:
    """Estimates the cost of measuring models of all sizes.

    The student, with all added layers, takes as much memory as the teacher.
    """
    teacher, student = models(cfg, chain)
    text = Sequences(cfg.num_sequences, cfg.seq_length, cfg.micro_batch_size)
    bf16 = cfg.precision == "bf16-mixed"
    # ``healed=True`` also counts the teacher's head, which stays in memory beside one model.
    cost = ranking_cost(teacher, bf16, text, chain.hardware, healed=True)
    compute = cost.compute  # the teacher's; the loop adds that of each measured model
    for num_layers in range(student.num_layers, teacher.num_layers):
        compute += text.compute(replace(teacher, num_layers=num_layers), bf16)
    return replace(cost, compute=compute)


def run(cfg: AddLayersConfig, inputs: Inputs, out: Path) -> Outcome:
    """Measures models of all sizes, and writes the model of the configured size."""
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
    student_shape, teacher_shape = (nemo.architecture_of(path) for path in (student, teacher))
    student_layers, teacher_layers = (
        inputs[name].manifest.result(KeptLayers).kept_layers for name in ("student", "teacher")
    )
    # Results number layers as in the model before all pruning. ``original_numbers`` has this number
    # for each layer of the teacher, which may be a pruned model, too.
    original_numbers = teacher_layers or list(range(1, teacher_shape.num_layers + 1))
    # ``kept`` and ``layers`` number layers as in the teacher, from 1.
    kept = layers_of_student(student_layers, original_numbers)
    text = read_sequences(inputs["data"], "heldout", cfg.seq_length, cfg.num_sequences)
    progress = partial(metrics_log(out).progress, "measure")
    sizes = measure_sizes(cfg, student, teacher, kept, text, progress)
    # The list starts with the student, so the index is the number of added layers.
    num_added = cfg.size(student_shape, teacher_shape) - len(kept)
    layers = layers_by_size(kept, teacher_shape.num_layers)[num_added]
    weights = combine_weights(student, teacher, kept, layers)
    checkpoint = out / teacher.name
    shape = replace(teacher_shape, num_layers=len(layers))
    save_weights(student, shape, weights, checkpoint)  # in the student's data type
    result = AddLayersResult(
        kept_layers=[original_numbers[layer - 1] for layer in layers],
        added_layers=[original_numbers[layer - 1] for layer in layers if layer not in kept],
        sizes=sizes,
        teacher_layers=teacher_shape.num_layers,
        teacher_parameters=teacher_shape.parameters(),
        tokens=text.tokens.numel(),
    )
    return checkpoint_outcome(result, checkpoint)


def _require_origin(inputs: Inputs) -> None:
    """Raises ``RecipeError`` if the student was pruned from a model other than the teacher.

    This covers students of other runs, whose origin ``check`` does not know.
    """
    from recipes.report.upstream import upstream

    student, teacher = inputs["student"].manifest, inputs["teacher"].manifest
    # A teacher may be a pruned model, too. Pruning upstream of the teacher is not checked.
    before_teacher = {m.fingerprint for m in upstream({"teacher": inputs["teacher"]}).values()}
    for manifest in (student, *upstream({"student": inputs["student"]}).values()):
        is_checked = manifest.stage == "prune" and manifest.fingerprint not in before_teacher
        if is_checked and manifest.inputs["checkpoint"] != teacher.fingerprint:
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
    disk_bytes=lambda config, chain: 4 * result_shape(config, chain).parameters(),  # if float32
)
