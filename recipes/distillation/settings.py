"""Settings of the stages that train, or that store what a teacher says. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from recipes.backend import SPEED_PATCH_NAMES
from recipes.core.constraints import (
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
"""Megatron's names of a layer's feed-forward part: of one that is dense, of one of experts."""
ATTENTION_BACKENDS = ("auto", "flash", "fused", "unfused")
FP8_RECIPES = {"tensorwise": 16, "blockwise": 16, "delayed": 16, "mxfp8": 32}
"""Ways to scale, and what sizes must be multiples of (``megatron/core/fp8_utils.py``)."""
TERMS = ("kd", "hidden", "lm")
"""Parts of the loss, each logged on its own."""
RESOURCE = {"resource": True}
RecomputeGranularity = Annotated[str, one_of(*RECOMPUTE_GRANULARITIES)]
RecomputeModule = Annotated[str, one_of("core_attn", *FEED_FORWARD)]
AttentionBackend = Annotated[str, one_of(*ATTENTION_BACKENDS)]
SpeedPatch = Annotated[str, one_of(*SPEED_PATCH_NAMES)]
Temperature = Annotated[float, between(0.01, 1000)]
"""Beyond these the teacher names one token, or none."""
Weight = Annotated[float, between(0, 1e6)]
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
"""Fraction of a moment that a step keeps."""


@dataclass
class TrainingConfig(StageConfig):
    """Settings of a training stage. Lengths in tokens, batches in sequences."""

    seq_length: Count = 256
    """Tokens of a window."""
    micro_batch_size: Count = field(default=4, metadata=RESOURCE)
    """Sequences that a rank holds at once. The loss is a mean over the tokens of the global batch,
    so this changes memory and speed, not the result."""
    global_batch_size: Count = 4
    """Sequences of a step, over all ranks."""
    max_steps: Count = 100
    """Steps of the optimizer; tokens are this times batch times length."""
    warmup_steps: CountOrZero = 10
    """Steps in which the learning rate rises to ``lr``."""
    lr: Positive = 1e-4
    """Peak of the learning rate, from which it falls as a cosine."""
    min_lr: PositiveOrZero = 1e-5
    """Where it ends."""
    weight_decay: PositiveOrZero = 0.1
    """AdamW's."""
    adam_beta1: Beta = 0.9
    """Fraction of the gradient's mean that a step keeps."""
    adam_beta2: Beta = 0.95
    """Fraction of the gradient's mean square that a step keeps."""
    clip_grad: Positive = 1.0
    """Largest norm of a gradient; a larger one is scaled down to it."""
    mask_document_ends: bool = True
    """Leaves out predictions of a document's first token from the document before it; beside
    conversations they are always left out."""
    precision: Precision = "bf16-mixed"
    """``bf16-mixed`` (float32 main weights in the optimizer) or ``32``."""
    grad_reduce_in_fp32: bool = True
    """Accumulates gradients in float32; off saves two bytes a parameter."""
    fp8: Annotated[str, one_of("hybrid")] | None = None
    """``hybrid`` multiplies in FP8 (E4M3 forward, E5M2 backward), with TransformerEngine on GPUs
    from Hopper on; weights stay in bfloat16, and so does a live teacher (``fp8_teacher``)."""
    fp8_recipe: Annotated[str, one_of(*FP8_RECIPES)] = "tensorwise"
    """How it is scaled: ``tensorwise``, ``blockwise``, ``delayed`` or ``mxfp8`` (Blackwell)."""
    first_last_layers_bf16: bool = True
    """Leaves the first and the last layer out of ``fp8``; ``delayed`` cannot."""
    max_nonfinite_steps: CountOrZero = 0
    """Steps with a loss or gradient that is not finite to skip before the run stops."""
    seed: Seed = 1234
    """Of the order of windows."""
    tensor_model_parallel_size: Count = field(default=1, metadata=RESOURCE)
    """Ranks that share each layer (TP)."""
    pipeline_model_parallel_size: Count = field(default=1, metadata=RESOURCE)
    """Ranks that the layers are split over, one after the other (PP)."""
    sequence_parallel: bool = field(default=False, metadata=RESOURCE)
    """Splits activations between tensor-parallel regions along the sequence; no effect at TP=1."""
    tp_comm_overlap: bool = field(default=False, metadata=RESOURCE)
    """Sends the parts of tensor-parallel products while others are computed, from buffers of
    TransformerEngine's, which one model can have."""
    context_parallel_size: Count = field(default=1, metadata=RESOURCE)
    """Splits each window over ranks, attention included; needs TransformerEngine, so GPUs."""
    expert_model_parallel_size: Count = field(default=1, metadata=RESOURCE)
    """Splits the experts of a mixture over the replicas."""
    num_distributed_optimizer_instances: Count = field(default=1, metadata=RESOURCE)
    """Copies of the optimizer's state, each over a part of the replicas, such as those of a node:
    weights are gathered within a part, and a rank's share of the gradients alone goes beyond it."""
    recompute_granularity: RecomputeGranularity = field(default="none", metadata=RESOURCE)
    """Computes activations again in the backward pass: ``none``, ``selective`` (those of
    ``recompute_modules``) or ``full`` (keeps a layer's input only)."""
    recompute_modules: Annotated[list[RecomputeModule], Field(min_length=1)] = field(
        default_factory=lambda: ["core_attn"], metadata=RESOURCE
    )
    """What ``selective`` computes again: ``core_attn`` (attention's scores, which flash attention
    does not hold anyway), ``mlp`` (the feed-forward part, most of what a layer holds, of which a
    loss on hidden states sees nothing) or ``moe`` (the same of experts)."""
    attention_backend: AttentionBackend = field(default="auto", metadata=RESOURCE)
    """TransformerEngine's: ``auto`` (the fastest that it has), ``flash``, ``fused`` (cuDNN) or
    ``unfused``."""
    val_check_interval: Count = 100
    """Steps between validations."""
    limit_val_batches: Count = 4
    """Global batches of a validation."""
    checkpoint_interval: Count = 100
    """Steps between checkpoints, which a killed run resumes from."""
    keep_checkpoints: Count = 2
    """The newest that are kept."""
    compile: bool | None = field(default=None, metadata=RESOURCE)
    """Makes one kernel of what lies between products, where layers are not TransformerEngine's, and
    of the loss where one rank has the vocabulary; which takes up to a minute once and, on a CPU, a
    C++ compiler. By default on this machine's CPU if that has one, from 100 steps on."""
    cpu_speed_patches: list[SpeedPatch] = field(
        default_factory=lambda: list(SPEED_PATCH_NAMES), metadata=RESOURCE
    )
    """Replacements of what is slow on a CPU (``recipes/backend/cpu_speed.py``). No result changes
    beyond rounding, and nothing changes on CUDA. ``[]`` for Megatron's own functions."""
    cuda_graphs: bool = field(default=False, metadata=RESOURCE)
    """Captures each of the student's layers once and replays it, which saves the launches of its
    kernels: worthwhile where they are short."""
    profile_steps: list[Count] = field(default_factory=list, metadata=RESOURCE)
    """``[first, last]`` steps to write a trace of, counted from 1, to ``<stage>/profile/``."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return dtype_of(self.precision)

    @property
    def recomputes_feed_forward(self) -> bool:
        """Whether the feed-forward part alone is computed again."""
        chosen = set(FEED_FORWARD) & set(self.recompute_modules)
        return self.recompute_granularity == "selective" and bool(chosen)

    @property
    def splits_sequence(self) -> bool:
        """Whether ``sequence_parallel`` has an effect."""
        return self.sequence_parallel and self.tensor_model_parallel_size > 1


SMALL_VOCABULARY = 1 << 16
"""Tokens of a vocabulary up to this are stored in two bytes."""


@dataclass
class CacheLogitsConfig(StageConfig):
    """Settings of ``cache_logits``."""

    top_k: Count = 64
    """Likeliest tokens to keep one by one."""
    tail_draws: CountOrZero = 0
    """Of all others so many are drawn by their probabilities, and stand for them: in the mean over
    draws, losses and gradients are those of the whole vocabulary, of ``forward_kl`` alone. With 0
    only their mass is kept, and they are one outcome."""
    temperature: Temperature = 1.0
    """That the teacher's distribution is stored at: the same as in ``distill``."""
    seq_length: Count = 256
    """Tokens of a window: the same as in ``distill``."""
    num_windows: Count | None = None
    """Windows of ``seq_length`` tokens, the first that a training of this ``seed`` sees; all by
    default, and fewer if the text is shorter."""
    seed: Seed = 1234
    """Of the order of windows: the same as in ``distill``."""
    windows_per_shard: Count = 64
    """Windows in a file, which is also what a killed run loses at most on each rank."""
    precision: Precision = "bf16-mixed"
    """As in training: ``bf16-mixed`` or ``32``."""
    micro_batch_size: Count = field(default=4, metadata={"resource": True})
    """Windows that a rank holds at once."""
    tensor_model_parallel_size: Count = field(default=1, metadata={"resource": True})
    """Ranks that share each layer of the teacher."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return dtype_of(self.precision)


def bytes_per_token(vocabulary: int, top_k: int, draws: int) -> int:
    """Size of what is stored for one position; see ``logit_cache``."""
    number = 2 if vocabulary <= SMALL_VOCABULARY else 4
    return (top_k + draws) * number + (top_k + 1 + (draws > 0)) * 2


@dataclass
class CorrectTeacherConfig(TrainingConfig):
    """Settings of ``correct_teacher``."""


CACHED = "logit_cache"
LOGITS_LOSSES = ("forward_kl", "reverse_kl", "jsd")
"""Each a function of ``losses.DIVERGENCES``."""
DRAWN_LOSS = "forward_kl"
"""What a cached teacher of ``tail_draws`` can teach, being linear in its probabilities."""
HIDDEN_LOSSES = ("cosine", "mse")
"""Each a function of ``hidden_loss.DISTANCES``."""
LOSS_BALANCERS = ("fixed", "dynamic")


@dataclass
class DistillConfig(TrainingConfig):
    """Settings of ``distill``: the loss, and what every training stage has."""

    kd_weight: Weight = 1.0
    """Weight of the loss on logits; 0 leaves it out."""
    logits_loss: Annotated[str, one_of(*LOGITS_LOSSES)] = "forward_kl"
    """``forward_kl``, ``reverse_kl``, or ``jsd`` (arXiv:2306.13649)."""
    temperature: Temperature = 1.0
    """That both distributions are softened by; the loss is multiplied by its square."""
    jsd_beta: Fraction = 0.5
    """The teacher's share of the mixture in ``jsd``, between 0 and 1."""
    top_k: Count | None = None
    """Compares the teacher's most likely tokens one by one and all others as one; a cached teacher
    has its own ``top_k``."""
    hidden_weight: Weight = 0.0
    """Weight of the loss on hidden states; 0 leaves it out."""
    hidden_loss: Annotated[str, one_of(*HIDDEN_LOSSES)] = "cosine"
    """``cosine`` or ``mse``."""
    intermediate_layer_pairs: list[list[Count]] = field(default_factory=list)
    """``[student layer, teacher layer]`` pairs, counted from 1; by default each layer that pruning
    kept with the one it was, as far as both are on the last pipeline stage."""
    lm_weight: Weight = 0.0
    """Weight of the next-token loss; 0 leaves it out."""
    fp8_teacher: bool = False
    """Multiplies in ``fp8`` in a live teacher, too."""
    loss_balancer: Annotated[str, one_of(*LOSS_BALANCERS)] = "fixed"
    """``fixed`` weights, or ``dynamic``: the terms are first scaled to equal size, as they were in
    the step before."""
    stop_at_recovered: Fraction | None = None
    """Ends the training at a validation at which so much of the divergence from the teacher is
    back, of what pruning left on that text; the teacher then runs in validations, too, and there is
    one before the first step. The learning rate stays what it is on its way to ``max_steps``."""
    loss_chunk_mb: Count | None = None
    """Size of one float32 buffer of the loss, which goes through the vocabulary a few tokens at a
    time; by default about a CPU's cache, or 512 on a GPU."""


CACHE_FIELDS = ("seq_length", "temperature", "top_k", "tail_draws")
"""Settings of a cached teacher that a distillation must match."""
