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
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.distillation.results import KeptLayers
from recipes.planning import rules
from recipes.planning.chain import Chain, sequence_problems
from recipes.planning.inference_cost import InferenceCost, Sequences, comparison_cost
from recipes.planning.rules import Problem
from recipes.planning.transformer import Compute
from recipes.pruning.results import AddLayersResult
from recipes.pruning.settings import AddLayersConfig
from recipes.stages.contract import Stage, checkpoint_outcome


def check(cfg: AddLayersConfig, chain: Chain) -> Iterator[Problem]:
    """Checks that only layers were pruned, and that the number of layers is between both models."""
    yield from sequence_problems(cfg.seq_length, cfg.inputs, chain)
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
    elif not student.num_layers <= cfg.size(student, teacher) < teacher.num_layers:
        yield Problem(
            rules.ADDED_LAYERS,
            f"{cfg.name}: num_layers={cfg.num_layers} is not between the student's "
            f"{student.num_layers} layers and the teacher's {teacher.num_layers}",
            f"set stages.{cfg.name}.num_layers to {student.num_layers} at least, and "
            f"{teacher.num_layers - 1} at most",
        )


def models(cfg: AddLayersConfig, chain: Chain) -> tuple[Architecture, Architecture]:
    """Returns the shapes of the teacher and of the student."""
    return chain.shape_of(cfg.inputs.get("teacher")), chain.shape_of(cfg.inputs.get("student"))


def result_shape(cfg: AddLayersConfig, chain: Chain) -> Architecture:
    """Returns the shape of the model that is written."""
    teacher, student = models(cfg, chain)
    return replace(teacher, num_layers=cfg.size(student, teacher))


def inference_cost(cfg: AddLayersConfig, chain: Chain) -> InferenceCost:
    """Estimates the cost of measuring all sizes. A model and its added layers fill one teacher."""
    teacher, student = models(cfg, chain)
    text = Sequences(cfg.num_sequences, cfg.seq_length, cfg.micro_batch_size)
    bf16 = cfg.precision == "bf16-mixed"
    cost = comparison_cost((teacher, teacher), bf16, text, chain.hardware)
    shapes = [replace(teacher, num_layers=n) for n in range(student.num_layers, teacher.num_layers)]
    compute = sum((text.compute(shape, bf16) for shape in (teacher, *shapes)), Compute())
    return replace(cost, compute=compute)


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

    student, teacher = (nemo.find_checkpoint(inputs[n].artifact) for n in ("student", "teacher"))
    shape, full = nemo.architecture_of(student), nemo.architecture_of(teacher)
    # Numbers of layers before all pruning, in case the teacher was pruned, too.
    layers_of = {n: inputs[n].manifest.result(KeptLayers).kept_layers for n in inputs}
    numbers = layers_of["teacher"] or list(range(1, full.num_layers + 1))
    kept = layers_of_student(layers_of["student"], numbers)
    text = read_sequences(inputs["data"], "heldout", cfg.seq_length, cfg.num_sequences)
    progress = partial(metrics_log(out).progress, "measure")
    sizes = measure_sizes(cfg, student, teacher, kept, text, progress)
    layers = layers_by_size(kept, full.num_layers)[cfg.size(shape, full) - len(kept)]
    weights = combine_weights(student, teacher, kept, layers)
    checkpoint = out / teacher.name
    save_weights(teacher, replace(full, num_layers=len(layers)), weights, checkpoint)
    result = AddLayersResult(
        kept_layers=[numbers[layer - 1] for layer in layers],
        added_layers=[numbers[layer - 1] for layer in layers if layer not in kept],
        sizes=sizes,
        teacher_layers=full.num_layers,
        teacher_parameters=full.parameters(),
        tokens=text.tokens.numel(),
    )
    return checkpoint_outcome(result, checkpoint)


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
