"""Settings of ``score``, ``prune``, ``heal`` and ``add_layers``. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from nemo_convert.architecture import Architecture
from recipes.core.constraints import Count, CountOrZero, Seed, Size, one_of
from recipes.core.precision import Precision
from recipes.core.stage import InferenceConfig, StageConfig
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.rules import Problem
from recipes.pruning.targets import PruneTargets, absolute_sizes, hidden_divisor

LAYER_METHODS = ("block_influence", "loss", "block")
TARGET = "target_"
"""Prefix of the fields with targets, such as ``target_hidden_size``. Megatron's name of the axis
follows the prefix."""


@dataclass
class PruneConfig(StageConfig):
    """Settings of ``prune``. An axis without a target is not pruned.

    A target is an absolute size, or a fraction of the teacher's size. ``0.75`` keeps three
    quarters. Numbers of channels are rounded to multiples of ``*_divisor``.
    """

    target_num_layers: Size | None = None
    """Number of layers to keep; ``layer_importance`` selects them."""
    layer_importance: Annotated[str, one_of(*LAYER_METHODS)] = "loss"
    """Which layers are dropped. ``loss``: the layers whose removal, one at a time, raises the loss
    least. ``block``: the adjacent layers whose removal together raises the loss least.
    ``block_influence`` (arXiv:2403.03853): the layers that change their input least. The forward
    passes that score channels and heads also give this score, at no extra cost. For SmolLM2 with 30
    layers, ``block`` gave the best distilled student of 24 layers, and ``loss`` the best of 20
    (docs/results.md)."""
    drop_layers: list[Count] = field(default_factory=list)
    """Drops exactly these layers, counted from 1, instead of ``target_num_layers``."""
    target_hidden_size: Size | None = None
    """Channels of the residual stream to keep."""
    target_ffn_hidden_size: Size | None = None
    """Channels of each feed-forward network to keep."""
    target_num_attention_heads: Size | None = None
    """Total number of query heads to keep. All groups keep the same number."""
    target_num_query_groups: Size | None = None
    """Query groups to keep, with all of their heads unless ``target_num_attention_heads`` is
    set."""
    target_num_moe_experts: Size | None = None
    """Experts of an MoE to keep in each layer."""
    target_moe_ffn_hidden_size: Size | None = None
    """Channels of each expert to keep."""
    hidden_size_divisor: Count | None = None
    """The hidden size must be a multiple of this. Default: 64, for fast kernels. For Llama models:
    the least common multiple (LCM) of 64 and the number of heads, because transformers 5 refuses
    other sizes; but 64 if eight times the LCM exceeds the teacher's hidden size."""
    ffn_hidden_size_divisor: Count = 64
    """The size of a feed-forward network, or of an expert, must be a multiple of this."""

    def explicit_targets(self) -> dict[str, int | float]:
        """Returns the targets that are set, by axis; floats are fractions."""
        return {
            name.removeprefix(TARGET): value
            for name, value in vars(self).items()
            if name.startswith(TARGET) and value is not None
        }

    def divisors(self, teacher: Architecture) -> dict[str, int]:
        """Returns, for each axis with a divisor, the number that its size must be a multiple of."""
        return {
            "hidden_size": hidden_divisor(teacher, self.hidden_size_divisor),
            "ffn_hidden_size": self.ffn_hidden_size_divisor,
            "moe_ffn_hidden_size": self.ffn_hidden_size_divisor,
        }

    def targets(self, teacher: Architecture) -> PruneTargets:
        """Returns the targets as absolute sizes, and the layers to drop."""
        sizes = absolute_sizes(teacher, self.explicit_targets(), self.divisors(teacher))
        return PruneTargets(**sizes, drop_layers=tuple(sorted(self.drop_layers)))

    def with_absolute_targets(self, teacher: Architecture) -> PruneConfig:
        """Returns these settings with all targets as absolute sizes."""
        sizes = absolute_sizes(teacher, self.explicit_targets(), self.divisors(teacher))
        fields: dict[str, Any] = {f"{TARGET}{axis}": size for axis, size in sizes.items()}
        return replace(self, **fields)


@dataclass
class HealConfig(InferenceConfig):
    """Settings of ``heal``, which fits a pruned model's weights to its teacher by least squares."""

    num_calibration_samples: Count = 64
    """Calibration sequences on which the weights are fitted."""
    num_samples: Count = 16
    """Validation sequences on which the KL is measured before and after healing."""
    precision: Precision = "32"
    """Precision of the KL measurement; the weights are fitted in float32."""


@dataclass
class AddLayersConfig(InferenceConfig):
    """Settings of ``add_layers``, which adds layers of the teacher to a distilled student."""

    num_layers: Count | None = None
    """Number of layers of the model that is written. Default: halfway from student to teacher."""
    num_sequences: Count = 40
    """Held-out sequences on which each model is measured. There is a model for each number of
    layers from the student's to one less than the teacher's."""

    def size(self, student: Architecture, teacher: Architecture) -> int:
        """Returns ``num_layers`` or its default."""
        return self.num_layers or (student.num_layers + teacher.num_layers) // 2


CALIBRATIONS = ("text", "random")
BASE_LOSS_SEQUENCES = 4
"""Number of sequences for the teacher's loss if ``num_loss_samples`` is 0."""


@dataclass
class ScoreConfig(InferenceConfig):
    """Settings of ``score``.

    Scores for ``layer_importance=loss`` and ``block`` cost most: a partial forward pass for each
    layer or block. One forward pass over the text gives all other scores.
    """

    micro_batch_size: Count = 4
    """Sequences of a forward pass. Their number changes the scores of an MoE's experts."""
    calibration: Annotated[str, one_of(*CALIBRATIONS)] = "text"
    """Calibrate on the ``text`` of the input, or on ``random`` tokens for a trial without text."""
    num_calibration_samples: Count = 64
    """Sequences from the calibration split."""
    num_loss_samples: CountOrZero = 8
    """Number of calibration sequences on which the loss is measured with each layer left out; 0
    omits these scores. The same number is taken from each source. A layer costs about 0.6 of a
    forward pass, because only the layers after it, and the head, run again."""
    block_sizes: list[Count] | None = None
    """Sizes of blocks of adjacent layers to measure, for ``layer_importance=block``. Default:
    for each ``prune`` stage of this run with that setting, the number of layers that it drops."""
    seed: Seed = 1234
    """Seed of ``random`` tokens."""
    pipeline_model_parallel_size: Count = field(default=1, metadata={"resource": True})
    """Ranks over which the layers are split. Further ranks split the text. Scores do not depend on
    the number of ranks."""

    @property
    def loss_sequences(self) -> int:
        """Number of sequences for losses, never 0, as the teacher's loss is always measured."""
        return self.num_loss_samples or BASE_LOSS_SEQUENCES


def layer_score_problems(
    config: StageConfig, layer_importance: str, drop_counts: Collection[int], chain: Chain
) -> Iterator[Problem]:
    """Yields a problem if the run's ``score`` stage does not measure scores that a stage needs.

    The stage ``config`` drops layers by the method ``layer_importance``, one of ``LAYER_METHODS``.
    ``drop_counts`` are the numbers of layers that the stage may drop, without 0.
    """
    score_name = config.inputs.get("importance", "")
    score = chain.stages.get(score_name)
    if not isinstance(score, ScoreConfig) or not drop_counts:
        return  # the scores are of another run, or are not needed
    measured_sizes = score.block_sizes or []
    if layer_importance == "block":
        all_sizes = ",".join(map(str, sorted({*measured_sizes, *drop_counts})))
        is_measured, setting = set(drop_counts) <= set(measured_sizes), f"block_sizes=[{all_sizes}]"
    elif layer_importance == "loss":
        is_measured, setting = score.num_loss_samples > 0, "num_loss_samples=8"
    else:  # block influence is always measured
        return
    if not is_measured:
        counts = " or ".join(map(str, sorted(drop_counts)))
        yield Problem(
            rules.LAYER_IMPORTANCE,
            f"{config.name} needs scores of layer_importance={layer_importance} to drop {counts} "
            f"layers, but {score_name} does not measure them",
            f"set stages.{score_name}.{setting}",
        )
