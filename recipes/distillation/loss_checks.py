"""Checks of a distillation's loss. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nemo_convert.architecture import Architecture
from nemo_convert.pipeline import last_stage_layers
from recipes.distillation.settings import TERMS, DistillConfig
from recipes.planning import rules
from recipes.planning.rules import Problem

REQUIREMENTS: dict[str, tuple[str, Callable[[DistillConfig], object]]] = {
    "logits_loss": ("kd_weight above 0", lambda cfg: cfg.kd_weight),
    "temperature": ("kd_weight above 0", lambda cfg: cfg.kd_weight),
    "top_k": ("kd_weight above 0", lambda cfg: cfg.kd_weight),
    "jsd_beta": ("logits_loss=jsd", lambda cfg: cfg.logits_loss == "jsd"),
    "hidden_loss": ("hidden_weight above 0", lambda cfg: cfg.hidden_weight),
    "intermediate_layer_pairs": ("hidden_weight above 0", lambda cfg: cfg.hidden_weight),
    "hidden_pipeline_stages": ("hidden_weight above 0", lambda cfg: cfg.hidden_weight),
    "loss_balancer": (
        "two of kd_weight, hidden_weight and lm_weight above 0",
        lambda cfg: sum(getattr(cfg, f"{term}_weight") > 0 for term in TERMS) > 1,
    ),
    "fp8_recipe": ("fp8=hybrid", lambda cfg: cfg.fp8),
}
"""Maps each setting to what it needs to have an effect: as text, and as a check of the settings."""


def loss_problems(cfg: DistillConfig, vocabulary: int) -> Iterator[Problem]:
    """Finds a loss without KD and LM terms, and settings that cannot work or have no effect.

    ``vocabulary`` is the size of the teacher's vocabulary.
    """
    if not (cfg.kd_weight or cfg.lm_weight):
        yield Problem(rules.LOSS, "kd_weight and lm_weight are both 0", "set one above 0")
    if cfg.hidden_weight and cfg.recompute_granularity == "full":
        yield Problem(
            rules.RECOMPUTE,
            f"hidden_weight={cfg.hidden_weight:g} does not work with recompute_granularity=full",
            "use recompute_granularity=none or selective, or hidden_weight=0",
        )
    default = DistillConfig()
    for name, (requirement, is_met) in REQUIREMENTS.items():
        value = getattr(cfg, name)
        if value != getattr(default, name) and not is_met(cfg):
            yield Problem(
                rules.NO_EFFECT,
                f"{name}={value} of {cfg.name} has no effect without {requirement}",
                f"leave {name} out, or set {requirement}",
            )
    if cfg.top_k is not None and cfg.top_k >= vocabulary:
        yield Problem(
            rules.TOP_K,
            f"top_k={cfg.top_k} must be less than the vocabulary size {vocabulary}",
            "use a smaller number, or null for all logits",
        )


def pair_problems(
    cfg: DistillConfig, student: Architecture, teacher: Architecture, cost: str = ""
) -> Iterator[Problem]:
    """Finds layers that are in two pairs, or are not on the last pipeline stage.

    ``cost``, for an error's fix, says how long training takes without pipeline parallelism.
    """
    if any(len(pair) != 2 for pair in cfg.intermediate_layer_pairs):
        yield Problem(
            rules.HIDDEN_PAIRS,
            f"invalid intermediate_layer_pairs={cfg.intermediate_layer_pairs}: each must be "
            "[student layer, teacher layer]",
            "for example [[12,15],[24,30]]",
        )
        return
    for index, role in enumerate(("student", "teacher")):
        paired = [pair[index] for pair in cfg.intermediate_layer_pairs]
        if repeated := sorted({layer for layer in paired if paired.count(layer) > 1}):
            yield Problem(
                rules.HIDDEN_PAIRS,
                f"intermediate_layer_pairs has the {role}'s layers {repeated} several times, but "
                "ModelOpt keeps a layer's output for one pair only",
                "use each layer in one pair",
            )
    stages = cfg.pipeline_model_parallel_size
    hidden_stages = cfg.hidden_pipeline_stages or stages
    name = "intermediate_layer_pairs" if cfg.intermediate_layer_pairs else "hidden_pipeline_stages"
    for index, (role, shape) in enumerate((("student", student), ("teacher", teacher))):
        if shape.num_layers < stages:
            continue  # ``planning.layouts.layout_problems`` reports this
        allowed = last_stage_layers(shape.num_layers, stages)
        default_layers = last_stage_layers(shape.num_layers, min(hidden_stages, shape.num_layers))
        layers = [pair[index] for pair in cfg.intermediate_layer_pairs] or default_layers
        if misplaced := [layer for layer in layers if layer not in allowed]:
            yield Problem(
                rules.HIDDEN_PAIRS,
                f"{name} selects the {role}'s layers {misplaced}, but ModelOpt computes all losses "
                f"on the last pipeline stage: layers {allowed.start} to {allowed.stop - 1}",
                f"change {name}, or set a smaller pipeline_model_parallel_size"
                + (f" (with 1, {cost})" if cost else ""),
            )
