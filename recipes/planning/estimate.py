"""What a training needs and costs, in closed form: memory of a rank, time of a step, money.

Pure arithmetic on shapes, a layout and a hardware profile. Sources of the formulas:

- FLOPs: 2 per weight and token forward, 4 backward (Kaplan et al., arXiv:2001.08361), and the
  attention scores, which are causal: half of 4·s·heads·channels a layer and token.
- Activations: what Megatron keeps of a layer (Korthikanti et al., arXiv:2205.05198), written out
  for gated feed-forward layers, RMSNorm and attention that never holds its scores.
- Optimizer: Adam with float32 main weights; 12 bytes a parameter, split over the replicas by
  Megatron's distributed optimizer (``megatron/core/optimizer/distrib_optimizer.py``).
- Communication of tensor parallelism: two all-reduces a layer forward, two backward, or the same
  as all-gather and reduce-scatter under sequence parallelism (arXiv:2205.05198, section 4.2.2).
- Pipeline: (p - 1) / m of a step is idle at m micro batches (arXiv:2104.04473, section 2.2.1).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from nemo_convert.architecture import Architecture
from nemo_convert.pipeline import pipeline_split
from recipes.planning.buffers import LOSS_CHUNK_BYTES
from recipes.planning.hardware import Hardware
from recipes.planning.work import (
    BACKWARD,
    Work,
    feed_forward_again,
    feed_forward_width,
    loss_bytes,
    passes_of,
    reading_bytes,
    update_bytes,
)
from recipes.planning.workload import CHECKPOINT_BYTES, Layout, Workload

COMPARING_BUFFERS, CHUNK_BUFFERS = 3, 2
"""Buffers of the loss that are alive at once: where all logits of two models are compared, and
where one model's are, with a few tokens."""
FRAGMENTATION = 1.05
"""Memory that an allocator holds for what is used; an assumption."""
OPTIMIZER_TRAFFIC = 30
"""Bytes that an Adam step reads and writes for a parameter."""

STORAGE_BYTES_PER_SECOND = 5e8
"""Of a checkpoint on its way to shared storage, from all ranks together; an assumption."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    teacher: float = 0
    activations: float = 0
    logits: float = 0
    reserved: float = 0

    @property
    def total(self) -> float:
        """All of it, as an allocator holds it."""
        every = sum(_values(self))
        return (every - self.reserved) * FRAGMENTATION + self.reserved


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, by what they are spent on."""

    compute: float
    bubble: float
    tensor_communication: float
    expert_communication: float
    gradient_communication: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of them, one after the other: nothing is taken to overlap."""
        return sum(_values(self))


def _values(record: Memory | Step) -> list[float]:
    return [getattr(record, part.name) for part in fields(record)]


def expert_parameters(arch: Architecture) -> int:
    """Parameters of all experts, which expert parallelism splits."""
    expert = 3 * arch.hidden_size * arch.moe_ffn_hidden_size
    return arch.num_layers * arch.num_moe_experts * expert


def rank_parameters(arch: Architecture, layout: Layout, stage: int) -> tuple[float, float]:
    """Parameters of a rank of a pipeline stage: those on every replica, and its experts.

    Tied embeddings are on the first and on the last stage, as Megatron has them.
    """
    table = arch.vocab_size * arch.hidden_size
    experts = expert_parameters(arch)
    layers = arch.parameters() - experts - table * (1 if arch.tied_embeddings else 2)
    first, last = stage == 0, stage == layout.pipeline - 1
    tables = first + last - (first and last and arch.tied_embeddings)
    share = _stage_layers(arch, layout, stage) / arch.num_layers
    dense = (layers * share + table * tables) / layout.tensor
    return dense, experts * share / (layout.tensor * layout.expert)


def _stage_layers(arch: Architecture, layout: Layout, stage: int) -> int:
    return pipeline_split(arch.num_layers, layout.pipeline)[stage]


def activation_bytes(arch: Architecture, layout: Layout, tokens: float) -> float:
    """Bytes that a layer's forward pass keeps of so many tokens for the backward pass, in bf16.

    Kept are inputs and outputs of both norms, queries, keys, values and the attention's output,
    both halves of the first feed-forward product and their gated product; where queries and keys
    are normalised, what goes into that, too. The first four are whole on every tensor-parallel rank
    unless the sequence is split too. Experts keep their tokens, which are gathered from all parts
    of a sequence, and the gated product once more, times the router's probability. Only
    the input of a feed-forward part that is computed again is kept.
    """
    whole = 4 * arch.hidden_size
    heads = 2 * (arch.num_attention_heads + arch.num_query_groups) * arch.kv_channels
    if arch.qk_layernorm:
        heads += (arch.num_attention_heads + arch.num_query_groups) * arch.kv_channels
    routed = arch.moe_router_topk * arch.hidden_size
    feed_forward = 3 * feed_forward_width(arch) + arch.moe_router_topk * arch.moe_ffn_hidden_size
    if layout.recompute_feed_forward:
        routed = feed_forward = 0
    split = layout.tensor if layout.sequence_parallel else 1
    return 2 * tokens * (whole / split + routed + (heads + feed_forward) / layout.tensor)


def memory(job: Workload, hardware: Hardware) -> Memory:
    """Memory of the fullest rank of any pipeline stage."""
    stages = range(job.layout.pipeline)
    return max((stage_memory(job, hardware, s) for s in stages), key=lambda m: m.total)


def stage_memory(job: Workload, hardware: Hardware, stage: int) -> Memory:
    """Memory of a rank of one pipeline stage, counted from 0."""
    layout = job.layout
    size = 2 if job.bf16 else 4
    parts = {"reserved": hardware.reserved_bytes}
    tokens = layout.micro_batch_size * job.seq_length / layout.context
    if job.trained is not None:
        dense, experts = rank_parameters(job.trained, layout, stage)
        expert_shards = max(1, layout.shards // layout.expert)
        states = 12 if job.bf16 else 8  # main weights in float32 and two moments, or the moments
        parts |= {
            "weights": size * (dense + experts),
            "gradients": _gradient_bytes(job, hardware, size) * (dense + experts),
            "optimizer": states * (dense / layout.shards + experts / expert_shards),
            "activations": _held_activations(job.trained, job, stage, tokens) * size / 2,
        }
    if job.teacher is not None:
        parts["teacher"] = size * sum(rank_parameters(job.teacher, layout, stage))
    if stage == layout.pipeline - 1:
        parts["logits"] = _logits_bytes(job, hardware, tokens)
    if job.trained is None:
        assert job.teacher is not None
        parts |= _read_at_once(job.teacher, layout, tokens, size, parts["logits"])
    return Memory(**parts)


def _gradient_bytes(job: Workload, hardware: Hardware, size: int) -> int:
    """Of a parameter; a CPU keeps them as they are made where nothing is added to them."""
    if not hardware.on_gpu and job.layout.ranks == job.micro_batches == 1:
        return size
    return job.gradient_bytes if job.bf16 else 4


def _read_at_once(
    arch: Architecture, layout: Layout, tokens: float, size: int, logits: float
) -> dict[str, float]:
    """What a model that only reads has of a layer, or of logits beside what they are made of."""
    layer = size / 2 * activation_bytes(arch, layout, tokens)
    states = 2 * size * tokens * arch.hidden_size  # before the last norm and after it
    if layer > states + logits:
        return {"activations": layer, "logits": 0.0}
    return {"activations": states, "logits": logits}


def _held_activations(arch: Architecture, job: Workload, stage: int, tokens: float) -> float:
    """Of all micro batches that a stage has begun and not finished (1F1B), at its peak.

    That is in the loss, between the norms of the last layer and the head; in a stage that has no
    loss, in the midst of a layer, of the teacher's or in the backward pass. A stage keeps what it
    is sent for each of them, a state of the student and one of the teacher, and has one more such
    message on its way.
    """
    layout = job.layout
    layer = activation_bytes(arch, layout, tokens)
    layers = _stage_layers(arch, layout, stage)
    begun = min(layout.pipeline - stage, job.micro_batches)
    whole = 2 * tokens * arch.hidden_size
    split = layout.tensor if layout.sequence_parallel else 1
    gathered = whole if split > 1 else 0  # the buffer of the sequence's all-gather stays
    last = 2 * whole / split if stage == layout.pipeline - 1 else layer
    sent = 0.0
    if layout.pipeline > 1:
        width = arch.hidden_size + (job.teacher.hidden_size if job.teacher else 0)
        sent = ((begun if stage else 0) + 1) * 2 * tokens * width / split
    if layout.recompute_granularity == "full":
        return begun * layers * whole / split + layer + gathered + sent
    if layout.recompute_feed_forward:
        again = activation_bytes(arch, replace(layout, recompute_feed_forward=False), tokens)
        last = max(last, again - layer)
    return begun * layers * layer + last + gathered + sent


def _logits_bytes(job: Workload, hardware: Hardware, tokens: float) -> float:
    """Logits, in whose place their gradient is made, a live teacher's, and the loss's buffers."""
    shape = job.trained or job.teacher
    assert shape is not None
    one = tokens * shape.vocab_size / job.layout.tensor
    chunk = min(LOSS_CHUNK_BYTES, 4 * one) if hardware.on_gpu else 0
    one *= 2 if job.bf16 else 4
    if job.trained is None:  # twice for a moment: Megatron puts the batch's axis first
        return max(2 * one, one + CHUNK_BUFFERS * chunk)
    buffers = CHUNK_BUFFERS if job.teacher is None else COMPARING_BUFFERS
    return (1 if job.teacher is None else 2) * one + (buffers + job.terms - 1) * chunk


def forward_flops(arch: Architecture, seq_length: int) -> float:
    """FLOPs of a token's forward pass in a window of so many tokens."""
    return passes_of(arch, seq_length, 2, 1).flops


def _passes(job: Workload, backward: int = 1) -> list[tuple[Architecture, int]]:
    """Models, and how often a token goes through them, a backward pass counted so many times."""
    again = job.layout.recompute_granularity == "full"  # forward once more
    found = [(job.trained, 1 + backward + again), (job.teacher, 1)]
    return [(arch, passes) for arch, passes in found if arch is not None]


def token_work(job: Workload) -> Work:
    """Of a token: student forward and backward, what is recomputed, teacher forward, loss."""
    size = 2 if job.bf16 else 4
    models = _passes(job, BACKWARD)
    parts = [passes_of(arch, job.seq_length, size, passes) for arch, passes in models]
    if job.trained is None:
        [(teacher, _)] = models
        logits = reading_bytes(teacher.vocab_size)
    else:
        live = job.teacher is not None
        logits = loss_bytes(job.trained.vocab_size, size, job.terms, live)
        if job.layout.recompute_feed_forward:
            parts.append(feed_forward_again(job.trained, size))
    starts = sum(passes * arch.num_layers for arch, passes in models)
    at_once = job.layout.micro_batch_size * job.seq_length
    return sum(parts, Work(bytes=logits, starts=starts / at_once))


def flops_per_token(job: Workload) -> float:
    """FLOPs of a token, as they are usually counted."""
    return token_work(job).flops


def unevenness(job: Workload) -> float:
    """FLOPs of the fullest pipeline stage, which all wait for, over those of the mean.

    The last stage has the heads; of a wide vocabulary they weigh as much as several layers.
    """
    stages = [0.0] * job.layout.pipeline
    for arch, passes in _passes(job, 2):
        head = 2 * arch.vocab_size * arch.hidden_size
        layer = (forward_flops(arch, job.seq_length) - head) / arch.num_layers
        for stage, layers in enumerate(pipeline_split(arch.num_layers, job.layout.pipeline)):
            stages[stage] += passes * layer * layers
        stages[-1] += passes * head
    return max(stages) * len(stages) / sum(stages)


def step_seconds(job: Workload, hardware: Hardware) -> Step:
    """Time of an optimizer step."""
    layout = job.layout
    tokens = job.global_batch_size * job.seq_length
    one = hardware.compute_seconds(token_work(job), job.bf16, layout.devices)
    compute = one * tokens / layout.ranks * unevenness(job)
    passed = tokens / (layout.data * layout.context)  # tokens that go through each stage's ranks
    gradients, optimizer = _update_seconds(job, hardware)
    link = hardware.link_bytes_per_second
    spread = (layout.expert - 1) / layout.expert
    return Step(
        compute=compute,
        bubble=compute * (layout.pipeline - 1) / max(1, job.micro_batches),
        tensor_communication=passed * _all_reduced(job) / link,
        expert_communication=passed * _dispatched(job) * spread / link,
        gradient_communication=gradients,
        optimizer=optimizer,
    )


def _all_reduced(job: Workload) -> float:
    """Bytes that a rank sends for a token because of tensor parallelism."""
    tensor, size = job.layout.tensor, 2 if job.bf16 else 4
    ring = 2 * (tensor - 1) / tensor
    layers = sum(2 * p * a.num_layers * a.hidden_size for a, p in _passes(job))
    return layers / job.layout.pipeline * size * ring


def _dispatched(job: Workload) -> float:
    """Bytes that a rank sends for a token because of expert parallelism: there and back."""
    size = 2 if job.bf16 else 4
    return sum(
        2 * p * a.num_layers * a.moe_router_topk * a.hidden_size * size for a, p in _passes(job)
    ) / (job.layout.pipeline * job.layout.tensor)


def _update_seconds(job: Workload, hardware: Hardware) -> tuple[float, float]:
    """Seconds of a step for the replicas' gradients and weights, and for the optimizer."""
    if job.trained is None:
        return 0.0, 0.0
    layout = job.layout
    parameters = max(
        sum(rank_parameters(job.trained, layout, stage)) for stage in range(layout.pipeline)
    )
    shards, copies = layout.shards, layout.optimizer_instances
    link, network = hardware.link_bytes_per_second, hardware.network_bytes_per_second
    wire = link if layout.nodes == 1 else network
    # The ranks of a part follow each other, a tensor-parallel group apart.
    within = link if copies > 1 and layout.tensor * shards <= layout.devices else wire
    sent = parameters * (job.gradient_bytes + 2) * (shards - 1) / shards / within
    sent += parameters / shards * job.gradient_bytes * 2 * (copies - 1) / copies / wire
    if hardware.traffic_share is None:
        return sent, parameters * OPTIMIZER_TRAFFIC / shards / hardware.bytes_per_second
    # Replicas on a CPU share its bandwidth.
    traffic = Work(bytes=parameters * update_bytes(job.micro_batches, 2 if job.bf16 else 4))
    return sent, hardware.compute_seconds(traffic, job.bf16)


def stopping_seconds(job: Workload, hardware: Hardware) -> float:
    """What a training may take to stop once its time is up.

    The step that it is in and one more, a validation between them, and a checkpoint. A pass of a
    teacher keeps what it has done, so it stops at once.
    """
    if job.trained is None:
        return 0.0
    step = step_seconds(job, hardware).total
    models = [arch for arch, _ in _passes(job)]
    forward = sum(forward_flops(arch, job.seq_length) for arch in models) / flops_per_token(job)
    save = CHECKPOINT_BYTES * job.trained.parameters() / STORAGE_BYTES_PER_SECOND
    return step * (2 + job.validation_batches * forward) + save


@dataclass(frozen=True)
class Estimate:
    """A job on a hardware profile."""

    memory: Memory
    step: Step
    tokens_per_second: float
    hours: float
    device_hours: float
    dollars: float
    flops: float
    """Of the whole job."""


def estimate(job: Workload, hardware: Hardware) -> Estimate:
    """Memory, time and money of a job."""
    step = step_seconds(job, hardware)
    hours = job.steps * step.total / 3600
    devices = job.layout.ranks if hardware.on_gpu else job.layout.nodes
    return Estimate(
        memory=memory(job, hardware),
        step=step,
        tokens_per_second=job.global_batch_size * job.seq_length / step.total,
        hours=hours,
        device_hours=hours * devices,
        dollars=hours * devices * hardware.price_per_hour,
        flops=flops_per_token(job) * job.tokens,
    )
