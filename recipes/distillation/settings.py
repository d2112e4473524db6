"""Settings of the stages that train, and of the stage that caches a teacher's logits.

Does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from nemo_convert.pipeline import last_stage_layers
from recipes.backend import SPEED_PATCH_NAMES
from recipes.core.constraints import (
    BlendWeight,
    Count,
    CountOrZero,
    Fraction,
    Positive,
    PositiveOrZero,
    Seed,
    between,
    one_of,
)
from recipes.core.precision import Precision, dtype_of
from recipes.core.stage import StageConfig

if TYPE_CHECKING:
    import torch

RECOMPUTE_GRANULARITIES = ("none", "selective", "full")
FEED_FORWARD = ("mlp", "moe")
"""Megatron's names of a layer's feed-forward network: dense, or MoE."""
FP8_RECIPES = {"tensorwise": 16, "blockwise": 16, "delayed": 16, "mxfp8": 32}
"""Maps each FP8 scaling recipe to the number that sizes of matrices must be multiples of
(``megatron/core/fp8_utils.py``)."""
FP8_CAPABILITIES = {"tensorwise": 8.9, "blockwise": 9.0, "delayed": 8.9, "mxfp8": 10.0}
"""Maps each FP8 scaling recipe to the lowest CUDA compute capability with which TransformerEngine
supports it."""
TERMS = ("kd", "hidden", "lm")
"""Names of the loss's terms in logs: on logits, on hidden states, and next-token (LM). The settings
``kd_weight``, ``hidden_weight`` and ``lm_weight`` are the weights of the terms."""
RESOURCE = {"resource": True}
"""Metadata of settings that do not change the result of a stage. They change the stage's speed,
memory or disk space, or the number of failures that it tolerates."""
RecomputeGranularity = Annotated[str, one_of(*RECOMPUTE_GRANULARITIES)]
RecomputeModule = Annotated[str, one_of("core_attn", *FEED_FORWARD)]
SpeedPatch = Annotated[str, one_of(*SPEED_PATCH_NAMES)]
Temperature = Annotated[float, between(0.01, 1000)]
"""With a lower temperature one token gets all probability, with a higher all get the same."""
Weight = Annotated[float, between(0, 1e6)]
"""Weight of a term of the loss."""
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
"""Decay rate of a moment of Adam."""
SMALL_VOCABULARY = 1 << 16
"""Largest vocabulary whose token ids are stored in two bytes."""


@dataclass
class TrainingConfig(StageConfig):
    """Settings of a training stage."""

    seq_length: Count = 256
    """Tokens per sequence."""
    micro_batch_size: Count = field(default=4, metadata=RESOURCE)
    """Sequences in one forward and backward pass on a rank. The loss is a mean over the tokens of
    the global batch, so this changes memory and speed, not the result."""
    global_batch_size: Count = 4
    """Sequences per step, over all ranks."""
    max_steps: Count = 100
    """Optimizer steps. Training uses max_steps · global_batch_size · seq_length tokens."""
    warmup_steps: CountOrZero = 10
    """Steps of linear warm-up to ``lr``."""
    lr: Positive = 1e-4
    """Peak learning rate, after warm-up. Then the learning rate decays as a cosine."""
    min_lr: PositiveOrZero = 1e-5
    """Learning rate at ``max_steps``."""
    weight_decay: Annotated[float, between(0, 10)] = 0.1
    """Weight decay of AdamW."""
    adam_beta1: Beta = 0.9
    """Decay rate of the gradient's mean."""
    adam_beta2: Beta = 0.95
    """Decay rate of the gradient's mean square."""
    clip_grad: Positive = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to this norm."""
    mask_document_ends: bool = True
    """Excludes the first token of each document from the loss, because the text before it is from
    another document. The first token of a conversation is always excluded."""
    precision: Precision = "bf16-mixed"
    """``bf16-mixed`` (float32 main weights in the optimizer) or ``32``."""
    grad_reduce_in_fp32: bool = True
    """Accumulates gradients in float32; ``false`` saves two bytes per parameter."""
    fp8: Annotated[str, one_of("hybrid")] | None = None
    """``hybrid``: matrix multiplications in FP8 (E4M3 forward, E5M2 backward) with
    TransformerEngine, on GPUs from Ada on. Weights, and a teacher that runs in training, stay in
    bfloat16."""
    fp8_recipe: Annotated[str, one_of(*FP8_RECIPES)] = "tensorwise"
    """FP8 scaling: ``tensorwise``, ``blockwise`` (from Hopper on), ``delayed`` or ``mxfp8`` (from
    Blackwell on). The first and the last layer are in bfloat16, except with ``delayed``."""
    max_nonfinite_steps: CountOrZero = field(default=0, metadata=RESOURCE)
    """Steps with a NaN or infinite gradient that are skipped before the run stops."""
    seed: Seed = 1234
    """Seed of the order of sequences."""
    weights: dict[str, BlendWeight] = field(default_factory=dict)
    """Relative number of training tokens of each source. Default: the weights that ``sources`` of
    ``prepare_data`` set (``my.jsonl#weight=0.7``). Without weights, longer sources count more."""
    tensor_model_parallel_size: Count = field(default=1, metadata=RESOURCE)
    """Ranks that share each layer (TP)."""
    pipeline_model_parallel_size: Count = field(default=1, metadata=RESOURCE)
    """Ranks over which the layers are split (PP)."""
    sequence_parallel: bool = field(default=False, metadata=RESOURCE)
    """Splits the activations outside tensor-parallel layers along the sequence; no effect at
    TP=1."""
    context_parallel_size: Count = field(default=1, metadata=RESOURCE)
    """Ranks over which each sequence is split, also in attention (CP). More than 1 needs
    TransformerEngine, so it needs GPUs."""
    expert_model_parallel_size: Count = field(default=1, metadata=RESOURCE)
    """Data-parallel ranks over which the experts of an MoE are split (EP). An interrupted training
    cannot resume after a change from 1 to more, or from more to 1, because Megatron then uses
    another optimizer."""
    num_distributed_optimizer_instances: Count = field(default=1, metadata=RESOURCE)
    """Copies of the optimizer's state. With one copy per node, weights are gathered within a node,
    and only gradient shards are reduced between nodes."""
    recompute_granularity: RecomputeGranularity = field(default="none", metadata=RESOURCE)
    """Recomputes activations in the backward pass: ``none``, ``selective`` (only in
    ``recompute_modules``) or ``full`` (stores only each layer's input)."""
    recompute_modules: Annotated[list[RecomputeModule], Field(min_length=1)] = field(
        default_factory=lambda: ["core_attn"], metadata=RESOURCE
    )
    """Modules that ``selective`` recomputes: ``core_attn`` (attention scores, which flash attention
    never stores), ``mlp`` (the feed-forward network, most of a layer's activations) or ``moe`` (the
    same for experts). All three can be combined with a loss on hidden states."""
    val_check_interval: Count = 100
    """Steps between validations."""
    limit_val_batches: Count = 4
    """Largest number of global batches in a validation. Less text gives fewer batches."""
    checkpoint_interval: Count = field(default=100, metadata=RESOURCE)
    """Steps between checkpoints. A killed run resumes from the last checkpoint."""
    keep_checkpoints: Count = field(default=2, metadata=RESOURCE)
    """Number of checkpoints on disk; older checkpoints are deleted."""
    compile: bool | None = field(default=None, metadata=RESOURCE)
    """Compiles elementwise operations of the loss (at TP=1), and of layers that are not
    TransformerEngine's. Compilation takes up to a minute once; on a CPU it needs a C++ compiler.
    Default: ``true`` if training runs on this machine's CPU, has 100 steps or more, and there is a
    compiler."""
    cpu_speed_patches: list[SpeedPatch] = field(
        default_factory=lambda: list(SPEED_PATCH_NAMES), metadata=RESOURCE
    )
    """Patches that make training on a CPU faster (``recipes/backend/cpu_speed.py``). They change
    results only by rounding, and have no effect on CUDA. ``[]`` uses none."""
    profile_steps: list[Count] = field(default_factory=list, metadata=RESOURCE)
    """``[first, last]`` step, counted from 1, of a profiler trace in ``<stage>/profile/``; ``[]``
    for no trace."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return dtype_of(self.precision)

    @property
    def recomputes_feed_forward(self) -> bool:
        """Whether ``selective`` recomputation includes the feed-forward network."""
        has_feed_forward = any(module in self.recompute_modules for module in FEED_FORWARD)
        return self.recompute_granularity == "selective" and has_feed_forward

    @property
    def splits_sequence(self) -> bool:
        """Whether ``sequence_parallel`` has an effect."""
        return self.sequence_parallel and self.tensor_model_parallel_size > 1


@dataclass
class CacheLogitsConfig(StageConfig):
    """Settings of ``cache_logits``."""

    top_k: Count = 64
    """Number of likeliest tokens, per position, that are stored with their probabilities."""
    tail_draws: CountOrZero = 0
    """Number of tokens, per position, that are sampled from outside the top-k. With samples,
    losses and gradients of ``forward_kl`` are unbiased estimates of those over the whole
    vocabulary. With 0, all tokens outside the top-k together count as one class."""
    temperature: Temperature = 1.0
    """Temperature of the stored distribution; must equal ``temperature`` of ``distill``."""
    seq_length: Count = 256
    """Tokens per sequence; must equal ``seq_length`` of ``distill``."""
    num_sequences: Count | None = None
    """Number of sequences to cache: the first that training with this ``seed`` reads.
    Default: all sequences."""
    seed: Seed = 1234
    """Seed of the order of sequences; must equal ``seed`` of ``distill``."""
    weights: dict[str, BlendWeight] = field(default_factory=dict)
    """Weights by source, as in ``distill``."""
    sequences_per_shard: Count = 64
    """Sequences per file; a killed run loses at most one file per rank."""
    precision: Precision = "bf16-mixed"
    """``bf16-mixed`` or ``32``, as in training."""
    micro_batch_size: Count = field(default=4, metadata=RESOURCE)
    """Sequences in one forward pass on a rank."""
    tensor_model_parallel_size: Count = field(default=1, metadata=RESOURCE)
    """Ranks that share each layer of the teacher."""


def bytes_per_token(vocabulary: int, top_k: int, draws: int) -> int:
    """Returns the bytes per token of text that a cached teacher takes on disk."""
    id_bytes = 2 if vocabulary <= SMALL_VOCABULARY else 4
    # Log-probabilities of the top-k tokens and of the tail. With draws, also the tail's entropy.
    float16_numbers = top_k + 1 + (1 if draws else 0)
    return (top_k + draws) * id_bytes + float16_numbers * 2


@dataclass
class CorrectTeacherConfig(TrainingConfig):
    """Settings of ``correct_teacher``, which trains the teacher on the LM loss."""


CACHE_KIND = "logit_cache"
"""Type of the artifact of ``cache_logits``."""
LOGITS_LOSSES = ("forward_kl", "reverse_kl", "jsd")
"""Names of the KD losses; ``losses.DIVERGENCES`` has their functions."""
TAIL_DRAWS_LOSS = "forward_kl"
"""The only KD loss that works with ``tail_draws``. It is linear in the sampled probabilities, so
its estimate from samples is unbiased."""
HIDDEN_LOSSES = {"cosine": 8, "mse": 4}
"""Maps each loss on hidden states to the bytes that it keeps per token and channel for the backward
pass: 8 for both models' states in float32, or 4 for the difference of the states.
``objective.DISTANCES`` has the functions."""
LOSS_BALANCERS = ("fixed", "dynamic")


@dataclass
class DistillConfig(TrainingConfig):
    """Settings of ``distill``: the loss, and the settings of every training stage."""

    kd_weight: Weight = 1.0
    """Weight of the KD loss on logits; 0 omits it."""
    logits_loss: Annotated[str, one_of(*LOGITS_LOSSES)] = "forward_kl"
    """``forward_kl``, ``reverse_kl``, or ``jsd`` (arXiv:2306.13649)."""
    temperature: Temperature = 1.0
    """Divides the logits of both models. The KD loss is multiplied by the temperature's square."""
    jsd_beta: Fraction = 0.5
    """The teacher's weight in the mean distribution of ``jsd``, between 0 and 1."""
    top_k: Count | None = None
    """Number of the teacher's likeliest tokens that stay separate classes in the KD loss. All other
    tokens become one class. Default: the whole vocabulary, or the ``top_k`` of a cached teacher."""
    hidden_weight: Weight = 0.0
    """Weight of the loss on hidden states; 0 omits it."""
    hidden_loss: Annotated[str, one_of(*HIDDEN_LOSSES)] = "cosine"
    """``cosine`` or ``mse``."""
    intermediate_layer_pairs: list[list[Count]] = field(default_factory=list)
    """``[student layer, teacher layer]`` pairs, counted from 1. Default: each layer of the student
    with the teacher's layer that it comes from, if both are on the last pipeline stage."""
    hidden_pipeline_stages: Count | None = None
    """Number of pipeline stages for the default pairs, whose layers are all on the last stage.
    Default: ``pipeline_model_parallel_size``. After a change to fewer stages, set this to the old
    number of stages to keep the same pairs."""
    lm_weight: Weight = 0.0
    """Weight of the next-token (LM) loss; 0 omits it."""
    loss_balancer: Annotated[str, one_of(*LOSS_BALANCERS)] = "fixed"
    """``fixed`` weights, or ``dynamic``: the loss on hidden states is scaled to the size of the KD
    loss, then the sum of these two losses is scaled to the size of the LM loss. Sizes are means of
    the previous step."""
    stop_at_recovered: Fraction | None = None
    """Stops training at the first validation in which this fraction of the KL added by pruning is
    recovered. The teacher then also runs in validation, and there is one validation before the
    first step. The learning rate still follows the schedule for ``max_steps``."""
    student_steps: list[Count] = field(default_factory=list)
    """Steps after which the student is also saved, in ``artifact/steps/STEP.nemo``. Benchmarks
    evaluate each of these students, and the report plots their scores."""


def uses_teacher(settings: Mapping[str, Any]) -> bool:
    """Returns whether a distillation with these settings needs a teacher for its loss."""
    return bool(settings["kd_weight"] or settings["hidden_weight"])


CACHE_FIELDS = ("seq_length", "temperature", "top_k", "tail_draws")
"""Settings that must be equal in ``cache_logits`` and in ``distill``."""


def hidden_state_bytes(cfg: DistillConfig, student_layers: int, teacher_layers: int) -> int:
    """Returns the bytes that the loss on hidden states keeps per token and channel of the teacher.

    Without configured pairs of layers, this is an upper limit: each layer on the last pipeline
    stage is in one pair at most.
    """
    if not cfg.hidden_weight:
        return 0
    stages = cfg.hidden_pipeline_stages or cfg.pipeline_model_parallel_size
    max_pairs = min(
        len(last_stage_layers(layers, min(stages, layers)))  # a stage has at least one layer
        for layers in (student_layers, teacher_layers)
    )
    pairs = len(cfg.intermediate_layer_pairs) or max_pairs
    return pairs * HIDDEN_LOSSES[cfg.hidden_loss]
