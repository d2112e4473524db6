"""Cost of a training run on a hardware profile: memory of a rank, time, device-hours and money.

A teacher's pass over a text, which caches its logits, counts as a training run without a student.

- Adam keeps float32 main weights and two moments: 12 bytes per parameter. Megatron's distributed
  optimizer splits them over the replicas.
- Tensor parallelism needs two all-reduces per layer and pass. With sequence parallelism these are
  all-gathers and reduce-scatters of the same volume (arXiv:2205.05198, section 4.2.2).
- A pipeline of p stages idles (p - 1) / m of a step of m micro batches (arXiv:2104.04473, 2.2.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_convert.architecture import Architecture
from nemo_convert.pipeline import pipeline_split
from recipes.planning.hardware import Hardware
from recipes.planning.transformer import (
    BACKWARD_PASSES,
    Compute,
    Memory,
    feed_forward_recompute,
    forward_flops,
    head_flops,
    largest,
    layer_activation_bytes,
    loss_bytes,
    pass_compute,
    peak_activation_bytes,
    rank_parameters,
    scoring_bytes,
    training_logits_bytes,
    update_bytes,
)
from recipes.planning.workload import CHECKPOINT_BYTES, Workload

OPTIMIZER_TRAFFIC = 30
"""Bytes that an Adam step on a GPU reads and writes for a parameter."""
STATE_BYTES = 12
"""Bytes of a parameter's state when it is gathered: a float32 weight and Adam's two moments."""
HOST_BYTES_PER_SECOND = 2e9
"""Rate at which a rank receives gathered state, concatenates it and copies it to its place in the
host's memory; an assumption."""
STORAGE_BYTES_PER_SECOND = 5e8
"""Rate at which all ranks together write a checkpoint to shared storage; an assumption."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, by cause."""

    compute: float
    bubble: float
    tensor_communication: float
    expert_communication: float
    gradient_communication: float
    optimizer: float

    @property
    def total(self) -> float:
        """Sum of all fields: assumes that nothing overlaps."""
        total: float = sum(vars(self).values())
        return total


@dataclass(frozen=True)
class TrainingCost:
    """Cost of a workload on a hardware profile."""

    memory: Memory
    step: StepTime
    tokens_per_second: float
    hours: float
    device_hours: float
    dollars: float
    flops: float
    """FLOPs of the whole workload."""


def training_cost(job: Workload, hardware: Hardware) -> TrainingCost:
    """Returns memory, time and money of a workload."""
    step = step_time(job, hardware)
    hours = job.steps * step.total / 3600
    devices = job.layout.ranks if hardware.on_gpu else job.layout.nodes
    return TrainingCost(
        memory=peak_memory(job, hardware),
        step=step,
        tokens_per_second=job.global_batch_size * job.seq_length / step.total,
        hours=hours,
        device_hours=hours * devices,
        dollars=hours * devices * hardware.price_per_hour,
        flops=token_compute(job).flops * job.tokens,
    )


def peak_memory(job: Workload, hardware: Hardware) -> Memory:
    """Returns the memory of the rank that needs most, over all pipeline stages."""
    return largest(*(stage_memory(job, hardware, s) for s in range(job.layout.pipeline)))


def stage_memory(job: Workload, hardware: Hardware, stage: int) -> Memory:
    """Returns the memory of a rank of one pipeline stage, counted from 0."""
    layout, size = job.layout, job.dtype_bytes
    tokens = layout.micro_batch_size * job.seq_length / layout.context
    parts: dict[str, float] = {"reserved": hardware.reserved_bytes}
    if job.trained is not None:
        dense, experts = rank_parameters(job.trained, layout, stage)
        expert_shards = max(1, layout.optimizer_shards // layout.expert)
        states = 12 if job.bf16 else 8  # two moments; with bfloat16, also main weights
        activations = peak_activation_bytes(job.trained, job, stage, tokens)
        parts |= {
            "weights": size * (dense + experts),
            "gradients": _gradient_bytes(job, hardware) * (dense + experts),
            "optimizer": states * (dense / layout.optimizer_shards + experts / expert_shards),
            "activations": activations * size / 2,
        }
    if job.teacher is not None:
        parts["teacher"] = size * sum(rank_parameters(job.teacher, layout, stage))
    if stage == layout.pipeline - 1:
        parts["logits"] = training_logits_bytes(job, hardware.on_gpu, tokens)
    if job.trained is None:
        assert job.teacher is not None
        layer = size / 2 * layer_activation_bytes(job.teacher, layout, tokens)
        normed = 2 * size * tokens * job.teacher.hidden_size  # input and output of the last norm
        if layer > normed + parts["logits"]:  # the peak is inside a layer, before the logits exist
            parts |= {"activations": layer, "logits": 0.0}
        else:
            parts["activations"] = normed
    return Memory(**parts)


def _gradient_bytes(job: Workload, hardware: Hardware) -> int:
    """Returns the bytes of a parameter's gradient.

    On a CPU, a gradient that is not summed over micro batches or ranks stays in its own type.
    """
    if not hardware.on_gpu and job.layout.ranks == job.micro_batches == 1:
        return job.dtype_bytes
    return job.gradient_bytes if job.bf16 else 4


def _passes(job: Workload, backward: int = 1) -> list[tuple[Architecture, int]]:
    """Returns each model with its passes per token; a backward pass counts ``backward`` times.

    FLOPs need ``backward=BACKWARD_PASSES``; a backward pass communicates as much as a forward one.
    """
    recomputed = job.layout.recompute_granularity == "full"
    passes = [(job.trained, 1 + backward + recomputed), (job.teacher, 1)]
    return [(arch, number) for arch, number in passes if arch is not None]


def token_compute(job: Workload) -> Compute:
    """Returns FLOPs and traffic per token: both models' passes, recomputation, and the loss."""
    size, models = job.dtype_bytes, _passes(job, BACKWARD_PASSES)
    total = Compute()
    for arch, passes in models:
        total += pass_compute(arch, job.seq_length, size, passes)
    if job.trained is not None:
        live = job.teacher is not None
        total += Compute(bytes=loss_bytes(job.trained.vocab_size, size, job.terms, live))
        if job.layout.recompute_feed_forward:
            total += feed_forward_recompute(job.trained, size)
    elif job.teacher is not None:
        total += Compute(bytes=scoring_bytes(job.teacher.vocab_size))
    layer_passes = sum(passes * arch.num_layers for arch, passes in models)
    micro_batch_tokens = job.layout.micro_batch_size * job.seq_length
    return total + Compute(layer_passes=layer_passes / micro_batch_tokens)


def pipeline_imbalance(job: Workload) -> float:
    """Returns the FLOPs of the busiest pipeline stage, divided by those of the mean stage.

    The last stage has the heads. With a large vocabulary, a head costs as much as several layers.
    """
    stages = [0.0] * job.layout.pipeline
    for arch, passes in _passes(job, BACKWARD_PASSES):
        head = head_flops(arch)
        layer = (forward_flops(arch, job.seq_length) - head) / arch.num_layers
        for stage, layers in enumerate(pipeline_split(arch.num_layers, job.layout.pipeline)):
            stages[stage] += passes * layer * layers
        stages[-1] += passes * head
    return max(stages) * len(stages) / sum(stages)


def step_time(job: Workload, hardware: Hardware) -> StepTime:
    """Returns the time of an optimizer step."""
    layout = job.layout
    tokens = job.global_batch_size * job.seq_length
    token_seconds = hardware.compute_seconds(token_compute(job), job.bf16, layout.devices)
    compute = token_seconds * tokens / layout.ranks * pipeline_imbalance(job)
    replica_tokens = tokens / (layout.data * layout.context)
    gradients, optimizer = _update_seconds(job, hardware)
    link = hardware.link_bytes_per_second
    return StepTime(
        compute=compute,
        bubble=compute * (layout.pipeline - 1) / max(1, job.micro_batches),
        tensor_communication=replica_tokens * _all_reduce_bytes(job) / link,
        expert_communication=replica_tokens * _all_to_all_bytes(job) / link,
        gradient_communication=gradients,
        optimizer=optimizer,
    )


def _all_reduce_bytes(job: Workload) -> float:
    """Returns the bytes per token that a rank sends in ring all-reduces of tensor parallelism."""
    tensor = job.layout.tensor
    ring = 2 * (tensor - 1) / tensor
    values = sum(2 * passes * arch.num_layers * arch.hidden_size for arch, passes in _passes(job))
    return values / job.layout.pipeline * job.dtype_bytes * ring


def _all_to_all_bytes(job: Workload) -> float:
    """Returns the bytes per token that a rank sends to experts of other ranks, and back."""
    layout = job.layout
    routed = sum(
        2 * passes * arch.num_layers * arch.moe_router_topk * arch.hidden_size * job.dtype_bytes
        for arch, passes in _passes(job)
    )
    return routed / (layout.pipeline * layout.tensor) * (layout.expert - 1) / layout.expert


def _update_seconds(job: Workload, hardware: Hardware) -> tuple[float, float]:
    """Returns the seconds per step to communicate gradients and weights, and to update weights."""
    if job.trained is None:
        return 0.0, 0.0
    layout = job.layout
    parameters = _largest_shard(job)
    shards, copies = layout.optimizer_shards, layout.optimizer_instances
    link, network = hardware.link_bytes_per_second, hardware.network_bytes_per_second
    across = link if layout.nodes == 1 else network
    # A copy's shards are on neighbouring tensor-parallel groups, so a copy may fit on one node.
    within = link if copies > 1 and layout.tensor * shards <= layout.devices else across
    # Within a copy: reduce-scatter of gradients and all-gather of bfloat16 weights.
    seconds = parameters * (job.gradient_bytes + 2) * (shards - 1) / shards / within
    # Between copies: all-reduce of each shard's gradients.
    seconds += parameters / shards * job.gradient_bytes * 2 * (copies - 1) / copies / across
    if hardware.bandwidth_fraction is None:
        return seconds, parameters * OPTIMIZER_TRAFFIC / shards / hardware.bytes_per_second
    # Replicas on a CPU share its bandwidth, so splitting the update over them saves no time.
    traffic = Compute(bytes=parameters * update_bytes(job.micro_batches, job.dtype_bytes))
    return seconds, hardware.compute_seconds(traffic, job.bf16)


def stopping_seconds(job: Workload, hardware: Hardware) -> float:
    """Returns the seconds that a training run may need to stop at a deadline.

    It may finish two steps with a validation between them, and saves a checkpoint. A teacher's pass
    saves its shards as it goes, so it stops at once.
    """
    if job.trained is None:
        return 0.0
    step = step_time(job, hardware).total
    forward = sum(forward_flops(arch, job.seq_length) for arch, _ in _passes(job))
    validation = job.validation_batches * forward / token_compute(job).flops
    write = CHECKPOINT_BYTES * job.trained.parameters() / STORAGE_BYTES_PER_SECOND
    return step * (2 + validation) + gathering_seconds(job, hardware) + write


def gathering_bytes(job: Workload) -> float:
    """Returns the bytes of host memory that each rank takes to save a checkpoint.

    A checkpoint can be resumed in another layout. So Megatron gathers the optimizer's state of a
    rank's shard of the model (``fully_reshardable``) from all data-parallel ranks, on each of them.
    """
    return STATE_BYTES * _largest_shard(job) if job.trained is not None else 0.0


def gathering_seconds(job: Workload, hardware: Hardware) -> float:
    """Returns the seconds for which a training pauses to save a checkpoint.

    The state is sent over the network once, and copied in the host's memory several times. Writing
    it to storage is asynchronous.
    """
    size = gathering_bytes(job)
    shards, layout = job.layout.optimizer_shards, job.layout
    across = (
        hardware.link_bytes_per_second if layout.nodes == 1 else hardware.network_bytes_per_second
    )
    return size * (shards - 1) / shards / across + size / HOST_BYTES_PER_SECOND


def _largest_shard(job: Workload) -> float:
    """Returns the parameters of the rank that has most."""
    trained, layout = job.trained, job.layout
    assert trained is not None
    return max(sum(rank_parameters(trained, layout, stage)) for stage in range(layout.pipeline))
