"""Settings of ``score``, ``prune`` and ``heal``. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from nemo_convert.architecture import Architecture
from recipes.core.constraints import Count, CountOrZero, Fraction, Seed, Size, one_of
from recipes.core.precision import Precision
from recipes.core.stage import StageConfig
from recipes.pruning.targets import PruneTargets, absolute_sizes, interpolated_shape

LAYER_METHODS = ("block_influence", "loss", "block", "greedy")
TARGET = "target_"
"""What the fields of targets begin with; then comes Megatron's name of the axis."""


@dataclass
class PruneConfig(StageConfig):
    """Settings of ``prune``. An axis without a target stays as it is.

    A target is a number, or a fraction of the teacher's size: ``0.75`` keeps three quarters,
    rounded to a multiple of the axis' divisor.
    """

    target_num_layers: Size | None = None
    """Keep this many layers, by ``layer_importance``."""
    layer_importance: Annotated[str, one_of(*LAYER_METHODS)] = "loss"
    """``loss``: its change without the layer; ``block_influence`` (arXiv:2403.03853): free;
    ``block``: the neighbouring layers that are missed least together; ``greedy``: one after the
    other. After distillation, of SmolLM2's 30 layers, ``block`` left the best 24 and ``loss`` the
    best 20 (docs/results.md)."""
    drop_layers: list[Count] = field(default_factory=list)
    """Drop exactly these layers, counted from 1, instead."""
    target_hidden_size: Size | None = None
    """Channels of the residual stream to keep."""
    target_ffn_hidden_size: Size | None = None
    """Channels of each feed-forward layer to keep."""
    target_num_attention_heads: Size | None = None
    """Query heads to keep, as many of each group."""
    target_num_query_groups: Size | None = None
    """Whole groups go, with their heads; by default each that stays keeps all of its heads."""
    target_num_moe_experts: Size | None = None
    """Experts of a mixture to keep in each layer."""
    target_moe_ffn_hidden_size: Size | None = None
    """Channels of each expert to keep."""
    round_fraction: Fraction | None = None
    """Prunes to this fraction of the way to the targets, or to a search's choice: 0.5 is the
    geometric mean of the sizes. Set for all but the last of several ``rounds``."""
    hidden_size_divisor: Count = 64
    """What the width must be a multiple of, for fast kernels."""
    ffn_hidden_size_divisor: Count = 64
    """Of an expert's width, too."""

    def explicit_targets(self) -> dict[str, int | float]:
        """Returns the targets that are set, by axis; floats are fractions."""
        named = {n: v for n, v in vars(self).items() if n.startswith(TARGET) and v is not None}
        return {name.removeprefix(TARGET): value for name, value in named.items()}

    def targets(self, teacher: Architecture) -> PruneTargets:
        """Returns the targets as numbers."""
        sizes = absolute_sizes(teacher, self.explicit_targets(), self.divisors())
        return PruneTargets(**sizes, drop_layers=tuple(sorted(self.drop_layers)))

    def intermediate_shape(self, before: Architecture, student: Architecture) -> Architecture:
        """Returns the shape to prune ``before`` to, on the way to the student's shape."""
        if self.round_fraction is None:
            return student
        return interpolated_shape(before, student, self.round_fraction, self.divisors())

    def with_absolute_targets(self, teacher: Architecture) -> PruneConfig:
        """Returns these settings with all targets as numbers."""
        sizes = absolute_sizes(teacher, self.explicit_targets(), self.divisors())
        numbers: dict[str, Any] = {f"{TARGET}{axis}": size for axis, size in sizes.items()}
        return replace(self, **numbers)

    def divisors(self) -> dict[str, int]:
        """Returns what each axis' target must be a multiple of."""
        return {
            "hidden_size": self.hidden_size_divisor,
            "ffn_hidden_size": self.ffn_hidden_size_divisor,
            "moe_ffn_hidden_size": self.ffn_hidden_size_divisor,
        }


@dataclass
class HealConfig(StageConfig):
    """Settings of ``heal``. What it costs is two forward passes and a few normal equations."""

    num_calibration_samples: Count = 64
    """Windows of ``seq_length`` tokens to heal on."""
    num_samples: Count = 16
    """Windows of the validation part, on which it is measured what healing brought back."""
    precision: Precision = "32"
    """What models are held and computed in when they are measured; healing is in float32."""
    seq_length: Count = 256
    """Tokens of a window."""
    micro_batch_size: Count = field(default=4, metadata={"resource": True})
    """Windows that are held at once."""


CALIBRATIONS = ("text", "random")
BASE_LOSS_WINDOWS = 4
"""Windows of the teacher's own loss where no layer is left out."""


@dataclass
class ScoreConfig(StageConfig):
    """Settings of ``score``. One pass gives widths and block influence; the rest costs more."""

    calibration: Annotated[str, one_of(*CALIBRATIONS)] = "text"
    """``text`` of the input, or ``random`` tokens: only to try out the machinery."""
    num_calibration_samples: Count = 64
    """Windows of ``seq_length`` tokens from the calibration part."""
    num_loss_samples: CountOrZero = 8
    """About so many of them, the first of each source, also tell how the loss changes when layers
    are left out, at about 0.6 of a forward pass a layer; 0 leaves that out."""
    block_sizes: list[Count] | None = None
    """Blocks of so many layers are left out together as well, for ``layer_importance=block``; by
    default of as many as the stages of this run drop that choose by it."""
    num_greedy_layers: CountOrZero = 0
    """Leaves out so many layers one after the other, each time the one that is missed least, for
    ``layer_importance=greedy``. Twice as many are tried each time."""
    precision: Precision = "32"
    """What the model is held and computed in, its head apart."""
    seq_length: Count = 256
    """Tokens of a window."""
    micro_batch_size: Count = field(default=4, metadata={"resource": True})
    """Windows that are held at once."""
    seed: Seed = 1234
    """Of ``random`` tokens."""
    pipeline_model_parallel_size: Count = field(default=1, metadata={"resource": True})
    """Ranks that the layers are split over; the scores are the same."""

    @property
    def loss_windows(self) -> int:
        """Windows that losses are measured on; the teacher's own always is."""
        return self.num_loss_samples or BASE_LOSS_WINDOWS
