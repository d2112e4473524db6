"""Cost of a training run on a hardware profile: memory of a rank, time, device-hours and money.

A pass over a text in which a teacher caches its logits counts as a training run without a student.

- For bfloat16 weights, Adam keeps float32 main weights and two moments: 12 bytes per parameter.
  Megatron's distributed optimizer splits them over the replicas.
- Tensor parallelism needs two all-reduces per layer and pass. With sequence parallelism these are
  all-gathers and reduce-scatters of the same volume (arXiv:2205.05198, section 4.2.2). In an MoE's
  experts, these transfer a copy of each token for each expert that the token is routed to
  (``megatron/core/transformer/moe/token_dispatcher.py``).
- Context-parallel ranks send keys and values around a ring, once in a forward pass. A backward pass
  sends keys and values again, with their gradients (TransformerEngine's ``cp_comm_type="p2p"``).
- A group of ranks that spans several nodes communicates at the speed of the network.
- A pipeline of p stages idles for (p - 1) / m of the time in which it computes m micro batches
  (arXiv:2104.04473, 2.2.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_convert.architecture import Architecture
from nemo_convert.pipeline import pipeline_split
from recipes.planning.hardware import STORAGE_BYTES_PER_SECOND, Hardware
from recipes.planning.transformer import (
    FORWARDS_PER_BACKWARD,
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
)
from recipes.planning.workload import CHECKPOINT_BYTES, Workload

OPTIMIZER_TRAFFIC = 30
"""Bytes per parameter that Adam's update of the weights reads and writes on a GPU."""
STATE_BYTES = 12
"""Bytes per parameter of the gathered state in a checkpoint: weight and two moments in float32."""
HOST_BYTES_PER_SECOND = 2e9
"""Assumed rate at which a rank receives gathered optimizer state, concatenates it and copies it to
the host's memory."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step on a rank, by cause."""

    compute: float
    """Computing on the busiest pipeline stage."""
    bubble: float
    """Waiting of a pipeline stage for the other stages."""
    tensor_communication: float
    context_communication: float
    expert_communication: float
    gradient_communication: float
    """Reduction of gradients, and gathering of the updated weights."""
    optimizer: float
    """Update of the weights."""

    @property
    def total(self) -> float:
        """Sum of all fields, as if communication never overlapped with computing."""
        total: float = sum(vars(self).values())
        return total


@dataclass(frozen=True)
class TrainingCost:
    """Cost of a workload on a hardware profile."""

    memory: Memory
    """Memory of the rank that needs the most."""
    step: StepTime
    tokens_per_second: float
    """Speed of training steps, without validations and checkpoints."""
    hours: float
    device_hours: float
    """Hours times GPUs, or on CPUs times nodes."""
    dollars: float
    flops: float
    """FLOPs of the whole workload."""


def hours_text(hours: float) -> str:
    """Formats hours with three significant digits, such as 1,230 and 0.0123."""
    rounded = float(f"{hours:.3g}")
    return f"{rounded:,.15g}"  # 15 digits suffice to write large numbers without an exponent


def training_cost(workload: Workload, hardware: Hardware) -> TrainingCost:
    """Returns memory, time and money of a workload."""
    step = step_time(workload, hardware)
    pause_seconds = workload.checkpoints * gathering_seconds(workload, hardware)
    pause_seconds += workload.validations * validation_seconds(workload, hardware)
    hours = (workload.steps * step.total + pause_seconds) / 3600
    devices = workload.layout.ranks if hardware.on_gpu else workload.layout.nodes
    return TrainingCost(
        memory=peak_memory(workload, hardware),
        step=step,
        tokens_per_second=workload.global_batch_size * workload.seq_length / step.total,
        hours=hours,
        device_hours=hours * devices,
        dollars=hours * devices * hardware.price_per_hour,
        flops=token_compute(workload).flops * workload.tokens,
    )


def peak_memory(workload: Workload, hardware: Hardware) -> Memory:
    """Returns the memory of the rank that needs the most, over all pipeline stages."""
    return largest(*(stage_memory(workload, hardware, s) for s in range(workload.layout.pipeline)))


def stage_memory(workload: Workload, hardware: Hardware, stage: int) -> Memory:
    """Returns the memory of a rank of one pipeline stage; ``stage`` counts from 0."""
    layout, dtype_bytes = workload.layout, workload.dtype_bytes
    tokens = layout.micro_batch_size * workload.seq_length / layout.context  # of a micro batch
    memory: dict[str, float] = {"reserved": hardware.reserved_bytes}  # fields of ``Memory``
    if workload.trained is not None:
        embeddings, layers, experts = rank_parameters(workload.trained, layout, stage)
        dense = embeddings + layers
        # Expert parallelism has already split the experts over replicas.
        expert_shards = max(1, layout.optimizer_shards // layout.expert)
        # Bytes of Adam's two float32 moments, and with bfloat16 also of float32 main weights.
        adam_bytes = 12 if workload.bf16 else 8
        weight_copies = workload.weight_copy_bytes * (layers + experts)
        memory |= {
            "weights": dtype_bytes * (dense + experts) + weight_copies,
            "gradients": _gradient_bytes(workload, hardware) * (dense + experts),
            "optimizer": adam_bytes * (dense / layout.optimizer_shards + experts / expert_shards),
            # ``peak_activation_bytes`` counts 2 bytes for each value, as in bfloat16.
            "activations": dtype_bytes / 2 * peak_activation_bytes(workload, stage, tokens),
        }
    if stage == layout.pipeline - 1:
        memory["logits"] = training_logits_bytes(workload, hardware.on_gpu, tokens)
    if workload.teacher is not None:
        memory["teacher"] = dtype_bytes * sum(rank_parameters(workload.teacher, layout, stage))
        if stage == layout.pipeline - 1:  # this stage has the loss, which may keep hidden states
            bytes_per_token = workload.hidden_state_bytes * workload.teacher.hidden_size
            hidden_states = bytes_per_token * tokens / layout.sequence_shards
            memory["activations"] = memory.get("activations", 0) + hidden_states
    if workload.trained is None:  # the teacher's pass over a text, on one pipeline stage
        assert workload.teacher is not None
        layer = dtype_bytes / 2 * layer_activation_bytes(workload.teacher, layout, tokens)
        last_norm = 2 * dtype_bytes * tokens * workload.teacher.hidden_size  # input and output
        if layer > last_norm + memory["logits"]:  # the peak is in a layer, before logits exist
            memory |= {"activations": layer, "logits": 0.0}
        else:
            memory["activations"] = last_norm
    return Memory(**memory)


def _gradient_bytes(workload: Workload, hardware: Hardware) -> int:
    """Returns the bytes of a parameter's gradient.

    On a CPU, a gradient that is not summed over micro batches or ranks has the type of the weights.
    """
    if not hardware.on_gpu and workload.layout.ranks == workload.micro_batches == 1:
        return workload.dtype_bytes
    return workload.gradient_bytes if workload.bf16 else 4


def _passes(workload: Workload, backward: int = 1) -> list[tuple[Architecture, int]]:
    """Returns each model with its number of passes. A forward pass counts once.

    A backward pass counts ``backward`` times. This is the ratio of its FLOPs, or of the bytes that
    it sends, to those of a forward pass.
    """
    is_recomputed = workload.layout.recompute_granularity == "full"
    passes = [(workload.trained, 1 + backward + is_recomputed), (workload.teacher, 1)]
    return [(arch, number) for arch, number in passes if arch is not None]


def token_compute(workload: Workload) -> Compute:
    """Returns the work per token: passes of both models, recomputation, and the loss."""
    dtype_bytes, models = workload.dtype_bytes, _passes(workload, FORWARDS_PER_BACKWARD)
    micro_batch_tokens = workload.layout.micro_batch_size * workload.seq_length
    layer_passes = sum(passes * arch.num_layers for arch, passes in models)
    total = Compute(layer_passes=layer_passes / micro_batch_tokens)
    for arch, passes in models:
        total += pass_compute(arch, workload.seq_length, dtype_bytes, passes)
    if workload.trained is not None:
        live_teacher = workload.teacher is not None
        loss = loss_bytes(workload.trained.vocab_size, dtype_bytes, workload.terms, live_teacher)
        total += Compute(bytes=loss)
        if workload.layout.recompute_feed_forward:
            total += feed_forward_recompute(workload.trained, dtype_bytes)
    elif workload.teacher is not None:
        total += Compute(bytes=scoring_bytes(workload.teacher.vocab_size))
    return total


def pipeline_imbalance(workload: Workload) -> float:
    """Returns the FLOPs of the busiest pipeline stage, divided by the mean over all stages.

    With a large vocabulary, a head costs as much as several layers.
    """
    stage_flops = [0.0] * workload.layout.pipeline
    for arch, passes in _passes(workload, FORWARDS_PER_BACKWARD):
        head = head_flops(arch)
        layer = (forward_flops(arch, workload.seq_length) - head) / arch.num_layers
        layer_counts = pipeline_split(arch.num_layers, workload.layout.pipeline)
        for stage, num_layers in enumerate(layer_counts):
            stage_flops[stage] += passes * layer * num_layers
        stage_flops[-1] += passes * head  # the last stage has the output heads of both models
    return max(stage_flops) * len(stage_flops) / sum(stage_flops)


def step_time(workload: Workload, hardware: Hardware) -> StepTime:
    """Returns the time of an optimizer step."""
    layout = workload.layout
    tokens = workload.global_batch_size * workload.seq_length
    token_seconds = hardware.compute_seconds(token_compute(workload), workload.bf16, layout.devices)
    compute = token_seconds * tokens / layout.ranks * pipeline_imbalance(workload)
    gradients, optimizer = _update_seconds(workload, hardware)
    # Tokens of a step that a data-parallel and context-parallel rank processes.
    rank_tokens = tokens / (layout.data * layout.context)

    def send_seconds(token_bytes: float, group_ranks: int) -> float:
        """Returns the time to send bytes for each token, within a group of neighbouring ranks."""
        bandwidth = hardware.link_rate(within_node=group_ranks <= layout.devices)
        return rank_tokens * token_bytes / bandwidth

    tensor = layout.tensor
    return StepTime(
        compute=compute,
        bubble=compute * (layout.pipeline - 1) / max(1, workload.micro_batches),
        tensor_communication=send_seconds(_all_reduce_bytes(workload), tensor),
        context_communication=send_seconds(_ring_bytes(workload), tensor * layout.context),
        expert_communication=send_seconds(_all_to_all_bytes(workload), tensor * layout.expert),
        gradient_communication=gradients,
        optimizer=optimizer,
    )


def _all_reduce_bytes(workload: Workload) -> float:
    """Returns the bytes per token that a rank sends in ring all-reduces of tensor parallelism."""
    tensor = workload.layout.tensor
    ring = 2 * (tensor - 1) / tensor  # bytes sent per byte of an all-reduced tensor
    # In each layer and pass, one all-reduce of attention and one of the feed-forward layer. In an
    # MoE, the latter has ``moe_router_topk`` copies of the token (0 in a dense model's settings).
    values = sum(
        (1 + max(1, arch.moe_router_topk)) * passes * arch.num_layers * arch.hidden_size
        for arch, passes in _passes(workload)
    )
    return values / workload.layout.pipeline * workload.dtype_bytes * ring


def _ring_bytes(workload: Workload) -> float:
    """Returns the bytes per token that a rank sends to other context-parallel ranks.

    In a forward pass, a rank sends keys and values of its tokens once to each of these ranks. In a
    backward pass, it sends them again, with their gradients.
    """
    layout = workload.layout
    # The first 2: keys and values. ``backward=2``: also their gradients.
    values = sum(
        2 * passes * arch.num_layers * arch.num_query_groups * arch.kv_channels
        for arch, passes in _passes(workload, backward=2)
    )
    split = layout.pipeline * layout.tensor
    return values / split * workload.dtype_bytes * (layout.context - 1)


def _all_to_all_bytes(workload: Workload) -> float:
    """Returns the bytes per token that a rank exchanges with the experts of other ranks."""
    layout = workload.layout
    values = sum(  # 2: to the experts and back
        2 * passes * arch.num_layers * arch.moe_router_topk * arch.hidden_size
        for arch, passes in _passes(workload)
    )
    sent_bytes = values * workload.dtype_bytes / (layout.pipeline * layout.tensor)
    return sent_bytes * (layout.expert - 1) / layout.expert  # some experts are on this rank


def _update_seconds(workload: Workload, hardware: Hardware) -> tuple[float, float]:
    """Returns seconds per step: communication of gradients and weights, and the weights' update."""
    if workload.trained is None:
        return 0.0, 0.0
    layout = workload.layout
    parameters = _most_parameters(workload)
    # The optimizer's state has ``copies``. Each copy is split into ``shards``, which are on
    # neighbouring tensor-parallel groups, so a copy may fit on one node.
    shards, copies = layout.optimizer_shards, layout.optimizer_instances
    bandwidth = hardware.link_rate(within_node=layout.nodes == 1)
    copy_on_node = copies > 1 and layout.tensor * shards <= layout.devices
    copy_bandwidth = hardware.link_rate(within_node=True) if copy_on_node else bandwidth
    # Within a copy: reduce-scatter of gradients and all-gather of weights.
    sent_bytes = workload.gradient_bytes + workload.dtype_bytes  # per parameter
    seconds = parameters * sent_bytes * (shards - 1) / shards / copy_bandwidth
    # Between copies: all-reduce of each shard's gradients.
    seconds += parameters / shards * workload.gradient_bytes * 2 * (copies - 1) / copies / bandwidth
    if hardware.bandwidth_fraction is None:  # a GPU
        return seconds, parameters * OPTIMIZER_TRAFFIC / shards / hardware.bytes_per_second
    # Replicas on a CPU share its bandwidth, so splitting the update over them saves no time.
    traffic = Compute(bytes=parameters * update_bytes(workload.micro_batches, workload.dtype_bytes))
    return seconds, hardware.compute_seconds(traffic, workload.bf16)


def update_bytes(micro_batches: int, dtype_bytes: int) -> float:
    """Returns the bytes of a parameter that an optimizer step on a CPU reads and writes."""
    # Each gradient after the first is read, and the float32 sum is read and written.
    gradient_sums = (dtype_bytes + 8) * (micro_batches - 1)
    # The norm reads the gradient. Adam reads it again, and reads and writes three float32 values:
    # weight and two moments. The new float32 weight is then read, and written in the model's type.
    gradient_norm, adam, new_weight = dtype_bytes, dtype_bytes + 24, 4 + dtype_bytes
    return gradient_sums + gradient_norm + adam + new_weight


def stopping_seconds(workload: Workload, hardware: Hardware) -> float:
    """Returns the seconds that a training run may need to stop at a deadline.

    At most, the run still finishes two steps with a validation between them, and then saves a
    checkpoint.
    """
    if workload.trained is None:  # a teacher saves logits continuously, and can stop at once
        return 0.0
    step = step_time(workload, hardware).total
    write = CHECKPOINT_BYTES * workload.trained.parameters() / STORAGE_BYTES_PER_SECOND
    pauses = validation_seconds(workload, hardware) + gathering_seconds(workload, hardware)
    return 2 * step + pauses + write


def validation_seconds(workload: Workload, hardware: Hardware) -> float:
    """Returns the seconds of one validation, which reaches the same FLOP/s as training steps."""
    models = [workload.trained, workload.teacher if workload.teacher_in_validation else None]
    flops = sum(forward_flops(arch, workload.seq_length) for arch in models if arch is not None)
    equivalent_steps = workload.validation_batches * flops / token_compute(workload).flops
    return equivalent_steps * step_time(workload, hardware).total


def gathering_bytes(workload: Workload) -> float:
    """Returns the bytes of host memory that each rank takes to save a checkpoint.

    Megatron (``fully_reshardable``) gathers, on each data-parallel rank, the whole optimizer state
    of the rank's shard of the model. So a run with another layout can resume the checkpoint.
    """
    return STATE_BYTES * _most_parameters(workload) if workload.trained is not None else 0.0


def gathering_seconds(workload: Workload, hardware: Hardware) -> float:
    """Returns the seconds for which a training run pauses to save a checkpoint.

    A rank receives the gathered state and copies it to the host's memory. The state is then written
    to storage without a pause.
    """
    size, shards = gathering_bytes(workload), workload.layout.optimizer_shards
    received_bytes = size * (shards - 1) / shards  # a rank already has one of the shards
    bandwidth = hardware.link_rate(within_node=workload.layout.nodes == 1)
    return received_bytes / bandwidth + size / HOST_BYTES_PER_SECOND


def _most_parameters(workload: Workload) -> float:
    """Returns the number of parameters of the rank that has the most."""
    trained, layout = workload.trained, workload.layout
    assert trained is not None
    return max(sum(rank_parameters(trained, layout, stage)) for stage in range(layout.pipeline))
