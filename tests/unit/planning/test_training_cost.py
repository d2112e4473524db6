"""Compares the estimated cost of training runs with publications, measurements and hand counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemo_convert.architecture import Architecture
from recipes.planning.hardware import CPU_PROFILES, LAYER_PASS_SECONDS
from recipes.planning.training_cost import (
    gathering_bytes,
    gathering_seconds,
    peak_memory,
    pipeline_imbalance,
    stage_memory,
    step_time,
    stopping_seconds,
    token_compute,
    training_cost,
)
from recipes.planning.transformer import forward_flops, layer_activation_bytes, loss_bytes
from recipes.planning.workload import Layout, Workload
from tests.unit.planning.models import (
    CPU,
    H100,
    HYBRIDS,
    LLAMA,
    NODES_96,
    QWEN,
    SMOLLM2,
    TINY,
    distillation,
    with_experts,
)

QWEN_DEPTH = replace(QWEN, num_layers=24)
QWEN_NAS = replace(QWEN, num_layers=30, hidden_size=3584, ffn_hidden_size=11776)
"""Students of NVIDIA's published distillations: Qwen3 8B pruned by depth, and by a search."""


def on_96_nodes(
    student: Architecture, teacher: Architecture, micro: int, **settings: Any
) -> Workload:
    """Returns a distillation on 768 GPUs; ``micro`` is the micro batch size."""
    layout = replace(NODES_96, micro_batch_size=micro)
    return distillation(student, teacher, layout=layout, **settings)


@pytest.mark.parametrize(
    # ``published`` is in GPU-hours. ``error`` is the relative error of today's estimate, with its
    # sign. The test fails if a change of the formulas moves this error.
    ("workload", "published", "error"),
    [
        # NVIDIA's blog of 7 October 2025, "about 6,000"; the utilisation was fitted to it.
        (on_96_nodes(QWEN_DEPTH, QWEN, 2), 6000, -0.03),
        # NVIDIA/Model-Optimizer#861: 28,500 steps, "~5.2k", and 16,000 steps, "~3k".
        (on_96_nodes(QWEN_NAS, QWEN, 8, steps=28_500), 5200, 0.16),
        (on_96_nodes(QWEN_NAS, QWEN, 8, steps=16_000), 3000, 0.13),
        # The tutorial of Nemotron-Nano-9B-v2 in that repository: "~9k". Without Mamba's scans.
        (on_96_nodes(*HYBRIDS, 4, seq_length=8192, steps=12_800), 9000, -0.36),
    ],
    ids=["qwen3-depth", "qwen3-nas-90B", "qwen3-nas-50B", "nemotron-nano-hybrid"],
)
def test_error_against_published_gpu_hours(
    workload: Workload, published: float, error: float
) -> None:
    actual_error = training_cost(workload, H100).device_hours / published - 1
    assert actual_error == pytest.approx(error, abs=0.015)


EPYC, XEON, XEON_CORE, AVX2 = (
    {"flops_per_second": bf16, "float32_flops_per_second": f32, "bytes_per_second": copy}
    for bf16, f32, copy in (
        (4.02e11, 1.87e11, 2.9e10),
        (1.71e12, 3.11e11, 2.58e10),
        (8.54e11, 1.65e11, 1.25e10),  # one core
        (1e10, 9.1e10, 2.03e10),  # one core
    )
)
"""Rates of processors in FLOP/s and bytes per second, measured just before the training runs below.

The first three have fast bfloat16 GEMMs. ``AVX2`` does not.
"""
DEPTH_PRUNED = replace(SMOLLM2, num_layers=24)  # SmolLM2 has 30 layers
WIDTH_PRUNED = replace(SMOLLM2, hidden_size=512, ffn_hidden_size=1152)


def cpu_training(student: Architecture, teacher: Architecture | None, **fields: Any) -> Workload:
    """Returns a training run of ten steps of 4 sequences of 256 tokens."""
    size = {"seq_length": 256, "global_batch_size": 4, "steps": 10}
    return distillation(student, teacher, layout=Layout(micro_batch_size=4), **size, **fields)


@pytest.mark.parametrize(
    # Without a teacher, the run reads cached logits. ``terms`` is the number of terms of the loss.
    ("rates", "bf16", "teacher", "student", "terms", "tokens_per_second"),
    [
        (EPYC, True, SMOLLM2, DEPTH_PRUNED, 1, 250),
        (EPYC, True, None, DEPTH_PRUNED, 1, 348),
        (XEON, True, SMOLLM2, DEPTH_PRUNED, 1, 531),
        (XEON, True, None, DEPTH_PRUNED, 1, 678),
        (XEON, False, SMOLLM2, DEPTH_PRUNED, 1, 230),
        (XEON_CORE, True, SMOLLM2, WIDTH_PRUNED, 1, 286),
        (XEON_CORE, False, SMOLLM2, WIDTH_PRUNED, 1, 119),
        (AVX2, False, SMOLLM2, DEPTH_PRUNED, 2, 72),
        (AVX2, False, SMOLLM2, replace(SMOLLM2, num_layers=20), 2, 82),
    ],
    ids=[
        *("live", "cached", "amx", "amx-cached", "amx-float32", "one-core", "one-core-float32"),
        *("float32", "float32-20"),
    ],
)
def test_estimated_speed_is_within_15_percent_of_measurements_on_a_cpu(
    rates: dict[str, float],
    bf16: bool,
    teacher: Architecture | None,
    student: Architecture,
    terms: int,
    tokens_per_second: float,
) -> None:
    """The speeds in tokens per second were measured as ``benchmarks/README.md`` describes."""
    workload = cpu_training(student, teacher, bf16=bf16, terms=terms)
    estimate = training_cost(workload, replace(CPU, **rates)).tokens_per_second
    assert estimate == pytest.approx(tokens_per_second, rel=0.15)


@pytest.mark.parametrize(
    ("bf16", "teacher", "peak_bytes"),
    [(True, SMOLLM2, 3.5e9), (True, None, 3.1e9), (False, SMOLLM2, 4.5e9)],
    ids=["live", "cached", "live-float32"],
)
def test_estimated_memory_is_within_5_percent_of_measurements_on_a_cpu(
    bf16: bool, teacher: Architecture | None, peak_bytes: float
) -> None:
    """``benchmarks.distill`` measured the peak memory in bytes."""
    workload = cpu_training(DEPTH_PRUNED, teacher, bf16=bf16)
    if teacher is not None:
        # 6 FLOPs per weight of the student, 2 per weight of the teacher, and attention's 30e6.
        assert token_compute(workload).flops == pytest.approx(979e6, rel=0.01)
    assert peak_memory(workload, CPU).total == pytest.approx(peak_bytes, rel=0.05)


def test_float32_takes_longer_than_bfloat16_on_any_device() -> None:
    workload = distillation(SMOLLM2, SMOLLM2, layout=Layout(), seq_length=256, global_batch_size=4)
    cpu_with_bfloat16 = replace(CPU, **CPU_PROFILES[True])
    # The ratios of GEMM rates are 2.1 on this CPU, and 15 on an H100, which computes float32
    # without tensor cores. Operations other than GEMMs lower the CPU's ratio.
    for hardware, least_ratio in ((cpu_with_bfloat16, 1.5), (H100, 10)):
        float32_hours = training_cost(replace(workload, bf16=False), hardware).hours
        assert float32_hours > least_ratio * training_cost(workload, hardware).hours


def test_time_of_a_step_on_a_cpu_equals_a_hand_count() -> None:
    """A step trains on one token in bfloat16.

    The CPU computes 10 bfloat16 FLOP/s and 5 float32 FLOP/s. Operations between GEMMs reach half
    of the bandwidth of 4 bytes per second: 2 bytes per second.
    """
    workload = distillation(TINY, None, layout=Layout(), seq_length=1, global_batch_size=1)
    rates = {"flops_per_second": 10.0, "float32_flops_per_second": 5.0, "bytes_per_second": 4.0}
    cpu = replace(CPU, **rates, bandwidth_fraction=0.5)
    step = step_time(workload, cpu)
    # Per weight: 2 FLOPs in the forward pass, and 4 in the backward pass.
    linear_layers = 3 * 2 * TINY.active_weights() / 10
    # One score with 14 FLOPs for each of 2 channels, at 0.6 of the float32 rate.
    attention = 14 * 2 / (0.6 * 5)
    traffic = token_compute(workload).bytes
    assert traffic > loss_bytes(5, 2, 1, live_teacher=False)  # the loss is a part of the traffic
    seconds = linear_layers + attention + traffic / 2 + 3 * LAYER_PASS_SECONDS
    assert step.compute == pytest.approx(seconds)
    # Bytes per parameter: the gradient's norm, Adam, and the new weight.
    assert step.optimizer == pytest.approx(TINY.parameters() * (2 + 26 + 6) / 2)
    # A second micro batch adds its gradient to a float32 sum: 10 bytes.
    two_batches = step_time(replace(workload, global_batch_size=2), cpu)
    assert two_batches.optimizer == pytest.approx(TINY.parameters() * (10 + 2 + 26 + 6) / 2)


def test_a_run_stops_after_two_steps_a_validation_and_a_checkpoint() -> None:
    workload = distillation(QWEN_DEPTH, QWEN, validation_batches=32)
    step = step_time(workload, H100).total
    forward = [forward_flops(arch, 4096) for arch in (QWEN_DEPTH, QWEN)]
    step_flops = 3 * forward[0] + forward[1]  # the student's backward pass counts twice
    # 14 bytes per parameter, at the assumed rate of the shared storage.
    save = 14 * QWEN_DEPTH.parameters() / 5e8 + gathering_seconds(workload, H100)
    # The teacher runs in validations only if they measure the KL divergence.
    for measures_kl, flops in ((False, forward[0]), (True, sum(forward))):
        validation = 32 * step * flops / step_flops  # 32 batches
        stopping = stopping_seconds(replace(workload, teacher_in_validation=measures_kl), H100)
        assert stopping == pytest.approx(2 * step + validation + save)
    assert stopping_seconds(replace(workload, trained=None), H100) == 0


def test_each_rank_gathers_the_optimizer_state_of_its_shard_of_the_model_to_save() -> None:
    workload = distillation(QWEN_DEPTH, QWEN)
    for tensor, nodes in ((2, 1), (4, 1), (2, 12)):
        layout = replace(workload.layout, tensor=tensor, nodes=nodes, devices=8)
        split = replace(workload, layout=layout)
        size = gathering_bytes(split)
        # A float32 weight and two moments per parameter.
        assert size == pytest.approx(12 * QWEN_DEPTH.parameters() / tensor, rel=1e-3)
        rate = H100.link_bytes_per_second if nodes == 1 else H100.network_bytes_per_second
        sent = 1 - tensor / (8 * nodes)  # fraction of the state that other ranks send
        host_copy = size / 2e9  # at the assumed rate to the host's memory
        assert gathering_seconds(split, H100) == pytest.approx(size * sent / rate + host_copy)
    assert gathering_bytes(replace(workload, trained=None)) == 0


def test_hours_include_checkpoints_and_validations() -> None:
    """A validation of three batches takes as long as a step.

    Without a live teacher, a step has three times the FLOPs of a forward pass.
    """
    workload = distillation(QWEN_DEPTH, None, steps=10)
    pauses = replace(workload, checkpoints=3, validation_batches=3, validations=2)
    seconds = (10 + 2) * step_time(workload, H100).total + 3 * gathering_seconds(workload, H100)
    assert 3600 * training_cost(pauses, H100).hours == pytest.approx(seconds)


def test_a_parameter_takes_18_bytes_on_one_gpu_and_fewer_on_several() -> None:
    """The weight is in bfloat16; gradient, main weight and two moments are in float32.

    Data-parallel ranks share the 12 bytes of main weight and moments.
    """
    workload = distillation(LLAMA, None, layout=Layout())
    one_gpu = peak_memory(workload, H100)
    assert one_gpu.weights + one_gpu.gradients + one_gpu.optimizer == 18 * LLAMA.parameters()
    sixteen = peak_memory(replace(workload, layout=Layout(nodes=2, devices=8)), H100)
    assert sixteen.optimizer == 12 * LLAMA.parameters() / 16
    fp8 = peak_memory(replace(workload, weight_copy_bytes=2), H100)
    layers = LLAMA.parameters() - 2 * LLAMA.vocab_size * LLAMA.hidden_size
    assert fp8.weights - one_gpu.weights == 2 * layers
    float32 = peak_memory(replace(workload, bf16=False), CPU)  # no separate main weight
    assert float32.weights + float32.gradients + float32.optimizer == 16 * LLAMA.parameters()
    four = peak_memory(replace(workload, teacher=LLAMA, layout=Layout(devices=4, tensor=4)), H100)
    assert four.teacher == pytest.approx(2 * LLAMA.parameters() / 4)
    # A teacher that caches its logits has only bfloat16 weights.
    cache = training_cost(replace(workload, trained=None, teacher=LLAMA), H100)
    assert cache.memory.optimizer == cache.memory.weights == cache.step.optimizer == 0
    assert cache.memory.teacher == 2 * LLAMA.parameters()


@pytest.mark.parametrize(
    ("micro_batches", "ranks", "gradient_bytes"), [(1, 1, 2), (2, 1, 4), (1, 2, 4)]
)
def test_a_cpu_holds_unsummed_gradients_in_bfloat16(
    micro_batches: int, ranks: int, gradient_bytes: int
) -> None:
    """Sums over micro batches or ranks are in float32. A GPU has float32 gradients in all cases."""
    layout = Layout(devices=ranks)
    workload = distillation(LLAMA, None, layout=layout, global_batch_size=micro_batches * ranks)
    assert peak_memory(workload, CPU).gradients == gradient_bytes * LLAMA.parameters()
    assert peak_memory(workload, H100).gradients == 4 * LLAMA.parameters()


def test_copies_of_the_optimizer_take_memory_and_reduce_network_traffic() -> None:
    """Each of two nodes with 8 GPUs has a copy of the optimizer's state.

    Without copies, a rank sends 15/16 of all gradients and weights over the network: 4 and 2 bytes
    per parameter. With copies, it sends 7/8 of them within its node. Over the network, it only
    sends the gradients of its shard, which is an eighth.
    """
    layout = Layout(nodes=2, devices=8)
    workload = distillation(LLAMA, None, layout=layout)
    with_copies = replace(workload, layout=replace(layout, optimizer_instances=2))
    parameters = LLAMA.parameters()
    assert peak_memory(with_copies, H100).optimizer == 12 * parameters / 8
    seconds = [step_time(run, H100).gradient_communication for run in (workload, with_copies)]
    link, network = H100.link_bytes_per_second, H100.network_bytes_per_second
    assert seconds[0] == pytest.approx(6 * parameters * 15 / 16 / network)
    within_node, between_nodes = 6 * parameters * 7 / 8 / link, 4 * parameters / 8 / network
    assert seconds[1] == pytest.approx(within_node + between_nodes)


def test_tensor_parallel_experts_communicate_a_copy_of_a_token_for_each_of_its_experts() -> None:
    """A dense layer has two all-reduces of a token: of attention, and of the feed-forward layer.

    With six active experts, the second one has six copies of the token.
    """
    layout = Layout(devices=4, tensor=4, sequence_parallel=True)
    dense, moe = (
        step_time(distillation(arch, None, layout=layout), H100).tensor_communication
        for arch in (SMOLLM2, with_experts(SMOLLM2, moe_router_topk=6))
    )
    assert moe == pytest.approx(dense * (1 + 6) / 2)


def test_groups_that_span_nodes_communicate_at_the_rate_of_the_network() -> None:
    ratio = H100.link_bytes_per_second / H100.network_bytes_per_second
    experts = with_experts(SMOLLM2)
    for sizes, communication in (
        ({"tensor": 8}, "tensor_communication"),
        ({"tensor": 2, "context": 4}, "context_communication"),
        ({"tensor": 2, "expert": 4}, "expert_communication"),
    ):
        # 64 GPUs. A group of 8 ranks is on one node of 8 GPUs, or spans two nodes of 4 GPUs.
        layouts = [
            Layout(nodes=64 // devices, devices=devices, **sizes)  # type: ignore[arg-type]
            for devices in (8, 4)
        ]
        one_node, two_nodes = (
            vars(step_time(distillation(experts, None, layout=layout), H100)) for layout in layouts
        )
        assert one_node[communication] > 0
        assert two_nodes[communication] == pytest.approx(ratio * one_node[communication])
        assert two_nodes["compute"] == one_node["compute"]


def test_context_parallel_ranks_send_keys_and_values_to_each_other() -> None:
    """A forward pass sends keys and values once. A backward pass also sends their gradients.

    So a backward pass sends twice as much. Each of four ranks has a quarter of the sequence.
    """
    layout = Layout(devices=4, context=4)
    workload = distillation(LLAMA, LLAMA, layout=layout, global_batch_size=1, seq_length=32768)
    chunk_bytes = 32768 / 4 * 2 * 8 * 128 * 2  # keys and values of 8 groups in bfloat16
    # The student's three transfers and the teacher's one, to 3 other ranks, in 32 layers.
    transfers = (3 + 1) * 3 * 32
    seconds = chunk_bytes * transfers / H100.link_bytes_per_second
    assert step_time(workload, H100).context_communication == pytest.approx(seconds)
    assert step_time(replace(workload, layout=Layout()), H100).context_communication == 0


def test_recomputing_and_sequence_parallelism_save_activations() -> None:
    layout = Layout(devices=8, tensor=2, micro_batch_size=2)
    workload = distillation(LLAMA, LLAMA, layout=layout)

    def activations(**changes: Any) -> float:
        return peak_memory(replace(workload, layout=replace(layout, **changes)), H100).activations

    assert activations(sequence_parallel=True) < activations()
    # Full recomputation keeps one of 10.5 values: a layer's input has 4,096 of the 43,008 values
    # per token. One whole layer is also in memory.
    assert activations(recompute_granularity="full") < activations() / 7
    # It repeats the student's forward pass: 5 instead of 4 passes with the teacher's.
    recomputed = replace(workload, layout=replace(layout, recompute_granularity="full"))
    assert step_time(recomputed, H100).compute > 1.2 * step_time(workload, H100).compute


def test_a_loss_on_hidden_states_keeps_them_in_float32_on_the_last_pipeline_stage() -> None:
    layout = Layout(devices=4, tensor=2, pipeline=2, sequence_parallel=True, micro_batch_size=2)
    workload = distillation(replace(LLAMA, num_layers=16), LLAMA, layout=layout)
    # Eight pairs of layers on the last stage. A pair has two float32 states: 8 bytes per channel.
    with_loss = replace(workload, hidden_state_bytes=8 * 8)
    added = [
        stage_memory(with_loss, H100, n).activations - stage_memory(workload, H100, n).activations
        for n in range(2)
    ]
    tokens = 2 * 4096 / 2  # a micro batch of 2 sequences; two tensor-parallel ranks split them
    assert added == pytest.approx([0, 8 * 8 * tokens * 4096])


def test_a_pipeline_holds_several_micro_batches_and_idles() -> None:
    layout = Layout(devices=4, pipeline=4, micro_batch_size=1)
    workload = distillation(LLAMA, None, layout=layout, global_batch_size=8)
    step = step_time(workload, H100)
    assert step.bubble == pytest.approx(step.compute * 3 / 8)  # 4 stages, 8 micro batches
    layer = layer_activation_bytes(LLAMA, layout, 4096)
    many_batches = replace(workload, global_batch_size=64)
    # The first stage has 8 layers, and 4 micro batches in flight.
    assert stage_memory(many_batches, H100, 0).activations > 4 * 8 * layer
    # A stage keeps the teacher's hidden states that it received for its micro batches in flight,
    # and one more buffer. The first stage receives none; the others have 3, 2 and 1 in flight.
    with_teacher = replace(workload, teacher=LLAMA)
    state = 2 * 4096 * 4096  # bytes: 4,096 tokens of 4,096 channels in bfloat16
    for stage, kept_states in enumerate((1, 1 + 3, 1 + 2, 1 + 1)):
        with_states, without_states = (
            stage_memory(run, H100, stage).activations for run in (with_teacher, workload)
        )
        assert with_states - without_states == pytest.approx(kept_states * state)


def test_a_pipeline_is_as_fast_as_its_busiest_stage() -> None:
    """Eight stages split 36 layers into 3, six times 5, and 3.

    The last stage also has the head. With 152k tokens in the vocabulary, it costs nearly 3 layers.
    """
    workload = distillation(QWEN, None, layout=Layout(devices=8, pipeline=8, micro_batch_size=1))
    head = 2 * QWEN.vocab_size * QWEN.hidden_size
    layer = (forward_flops(QWEN, 4096) - head) / 36
    stages = [3 * layer, *[5 * layer] * 6, 3 * layer + head]
    assert pipeline_imbalance(workload) == pytest.approx(max(stages) * 8 / sum(stages))
    unsplit = replace(workload, layout=Layout(devices=8))
    assert pipeline_imbalance(unsplit) == pytest.approx(1)
    slower = step_time(workload, H100).compute / step_time(unsplit, H100).compute
    assert slower == pytest.approx(pipeline_imbalance(workload))
