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
    LLAMA,
    NODES_96,
    QWEN,
    SMOLLM2,
    distillation,
    with_experts,
)

QWEN_DEEP = replace(QWEN, num_layers=24)
QWEN_NAS = replace(QWEN, num_layers=30, hidden_size=3584, ffn_hidden_size=11776)


def hybrid_as_dense(layers: int, hidden: int, parameters: float) -> Architecture:
    """Approximates a hybrid of Mamba, attention and feed-forward blocks (Nemotron Nano v2).

    Two blocks count as one transformer layer. The feed-forward width is chosen to match the
    published number of parameters, so the FLOPs of linear layers are right. Mamba's scans are not
    counted.
    """
    bare = Architecture("", layers, hidden, 0, 40, 8, 128, 131072, 131072, tied_embeddings=False)
    width = (parameters - bare.parameters()) / (3 * hidden * layers)
    return replace(bare, ffn_hidden_size=int(width))


def on_96_nodes(
    student: Architecture, teacher: Architecture, micro: int, **settings: Any
) -> Workload:
    layout = replace(NODES_96, micro_batch_size=micro)
    return distillation(student, teacher, layout=layout, **settings)


HYBRIDS = hybrid_as_dense(24, 4352, 7.00e9), hybrid_as_dense(28, 4480, 8.89e9)
"""The student, and its teacher Nemotron-Nano-9B-v2."""


@pytest.mark.parametrize(
    # ``error`` is the signed relative error of the estimate. It is fixed, to notice changes.
    ("workload", "published", "error", "tolerance"),
    [
        # NVIDIA's blog of 7 October 2025, "about 6,000"; the utilisation was fitted to it.
        (on_96_nodes(QWEN_DEEP, QWEN, 2), 6000, -0.03, 0.05),
        # NVIDIA/Model-Optimizer#861: 28,500 steps, "~5.2k", and 16,000 steps, "~3k".
        (on_96_nodes(QWEN_NAS, QWEN, 8, steps=28_500), 5200, 0.16, 0.20),
        (on_96_nodes(QWEN_NAS, QWEN, 8, steps=16_000), 3000, 0.13, 0.20),
        # The tutorial of Nemotron-Nano-9B-v2 in that repository: "~9k". Without Mamba's scans.
        (on_96_nodes(*HYBRIDS, 4, seq_length=8192, steps=12_800), 9000, -0.36, 0.40),
    ],
    ids=["qwen3-depth", "qwen3-nas-90B", "qwen3-nas-50B", "nemotron-nano-hybrid"],
)
def test_error_against_published_gpu_hours(
    workload: Workload, published: float, error: float, tolerance: float
) -> None:
    estimated = training_cost(workload, H100).device_hours / published - 1
    assert estimated == pytest.approx(error, abs=0.015)
    assert abs(estimated) <= tolerance


EPYC, XEON, XEON_CORE, AVX2 = (
    {"flops_per_second": bf16, "float32_flops_per_second": f32, "bytes_per_second": copy}
    for bf16, f32, copy in (
        (4.02e11, 1.87e11, 2.9e10),
        (1.71e12, 3.11e11, 2.58e10),
        (8.54e11, 1.65e11, 1.25e10),  # one core
        (1e10, 9.1e10, 2.03e10),  # one core
    )
)
"""Rates of each processor, measured just before the training runs below."""
DEEP = replace(SMOLLM2, num_layers=24)
NARROW = replace(SMOLLM2, hidden_size=512, ffn_hidden_size=1152)


def cpu_training(student: Architecture, teacher: Architecture | None, **fields: Any) -> Workload:
    """Returns a training run of ten steps of 4 sequences of 256 tokens."""
    size = {"seq_length": 256, "global_batch_size": 4, "steps": 10}
    return distillation(student, teacher, layout=Layout(micro_batch_size=4), **size, **fields)


@pytest.mark.parametrize(
    ("rates", "bf16", "teacher", "student", "terms", "tokens_per_second"),
    [
        (EPYC, True, SMOLLM2, DEEP, 1, 250),
        (EPYC, True, None, DEEP, 1, 348),
        (XEON, True, SMOLLM2, DEEP, 1, 531),
        (XEON, True, None, DEEP, 1, 678),
        (XEON, False, SMOLLM2, DEEP, 1, 230),
        (XEON_CORE, True, SMOLLM2, NARROW, 1, 286),
        (XEON_CORE, False, SMOLLM2, NARROW, 1, 119),
        (AVX2, False, SMOLLM2, DEEP, 2, 72),
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
    """``benchmarks/README.md`` describes the measurements."""
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
    """``benchmarks.distill`` measures the peak."""
    workload = cpu_training(DEEP, teacher, bf16=bf16)
    if teacher is not None:
        # 6 FLOPs per weight of the student, 2 per weight of the teacher, and attention's 30e6.
        assert token_compute(workload).flops == pytest.approx(979e6, rel=0.01)
    assert peak_memory(workload, CPU).total == pytest.approx(peak_bytes, rel=0.05)


def test_float32_takes_longer_than_bfloat16_on_any_device() -> None:
    workload = distillation(SMOLLM2, SMOLLM2, layout=Layout(), seq_length=256, global_batch_size=4)
    # An H100 computes float32 without tensor cores.
    for hardware, least_ratio in ((replace(CPU, **CPU_PROFILES[True]), 1.5), (H100, 10)):
        float32_hours = training_cost(replace(workload, bf16=False), hardware).hours
        assert float32_hours > least_ratio * training_cost(workload, hardware).hours


def test_time_of_a_step_on_a_cpu_equals_a_hand_count() -> None:
    """The model has one layer with one head of two channels; one token; bfloat16. Operations
    between GEMMs reach half of the bandwidth: 2 bytes per second."""
    tiny = Architecture("", 1, 2, 3, 1, 1, 2, 5, 8, tied_embeddings=True)
    workload = distillation(tiny, None, layout=Layout(), seq_length=1, global_batch_size=1)
    rates = {"flops_per_second": 10.0, "float32_flops_per_second": 5.0, "bytes_per_second": 4.0}
    cpu = replace(CPU, **rates, bandwidth_fraction=0.5)
    step = step_time(workload, cpu)
    gemms = 3 * 2 * tiny.active_weights() / 10 + 14 * 2 / (0.6 * 5)  # attention: 0.6 of float32
    traffic = token_compute(workload).bytes
    assert traffic > loss_bytes(5, 2, 1, live_teacher=False)
    assert step.compute == pytest.approx(gemms + traffic / 2 + 3 * LAYER_PASS_SECONDS)
    assert step.optimizer == pytest.approx(tiny.parameters() * (2 + 26 + 6) / 2)
    two_batches = step_time(replace(workload, global_batch_size=2), cpu)
    assert two_batches.optimizer == pytest.approx(tiny.parameters() * (10 + 2 + 26 + 6) / 2)


def test_a_run_stops_after_two_steps_a_validation_and_a_checkpoint() -> None:
    workload = distillation(QWEN_DEEP, QWEN, validation_batches=32)
    step = step_time(workload, H100).total
    forward = [forward_flops(arch, 4096) for arch in (QWEN_DEEP, QWEN)]
    step_flops = 3 * forward[0] + forward[1]
    save = 14 * QWEN_DEEP.parameters() / 5e8 + gathering_seconds(workload, H100)
    # The teacher runs in validations only if these must measure the KL.
    for measures_kl, flops in ((False, forward[0]), (True, sum(forward))):
        validation = 32 * step * flops / step_flops
        stopping = stopping_seconds(replace(workload, teacher_in_validation=measures_kl), H100)
        assert stopping == pytest.approx(2 * step + validation + save)
    assert stopping_seconds(replace(workload, trained=None), H100) == 0


def test_each_rank_gathers_the_state_of_its_shard_of_the_model_to_save() -> None:
    workload = distillation(QWEN_DEEP, QWEN)
    for tensor, nodes in ((2, 1), (4, 1), (2, 12)):
        layout = replace(workload.layout, tensor=tensor, nodes=nodes, devices=8)
        split = replace(workload, layout=layout)
        size = gathering_bytes(split)
        assert size == pytest.approx(12 * QWEN_DEEP.parameters() / tensor, rel=1e-3)
        rate = H100.link_bytes_per_second if nodes == 1 else H100.network_bytes_per_second
        sent = 1 - tensor / (8 * nodes)  # fraction of the state that other ranks send
        assert gathering_seconds(split, H100) == pytest.approx(size * (sent / rate + 1 / 2e9))
    assert gathering_bytes(replace(workload, trained=None)) == 0


def test_hours_include_the_pauses_for_checkpoints() -> None:
    workload = distillation(QWEN_DEEP, QWEN, steps=10)
    hours = training_cost(replace(workload, checkpoints=3), H100).hours
    pauses = 3 * gathering_seconds(workload, H100)
    assert 3600 * hours == pytest.approx(10 * step_time(workload, H100).total + pauses)


def test_hours_include_validations() -> None:
    """A validation of three batches has three forward passes of a step's three passes."""
    workload = distillation(QWEN_DEEP, None, steps=10, validation_batches=3, validations=2)
    assert 3600 * training_cost(workload, H100).hours == pytest.approx(
        (10 + 2) * step_time(workload, H100).total
    )


def test_a_parameter_takes_18_bytes_on_one_gpu() -> None:
    """The weight is in bfloat16; gradient, main weight and two moments are in float32."""
    workload = distillation(LLAMA, None, layout=Layout())
    one_gpu = peak_memory(workload, H100)
    assert one_gpu.weights + one_gpu.gradients + one_gpu.optimizer == 18 * LLAMA.parameters()
    sixteen_gpus = peak_memory(replace(workload, layout=Layout(nodes=2, devices=8)), H100)
    assert sixteen_gpus.optimizer == 12 * LLAMA.parameters() / 16
    float32 = peak_memory(replace(workload, bf16=False), CPU)  # no separate main weight
    assert float32.weights + float32.gradients + float32.optimizer == 16 * LLAMA.parameters()
    with_teacher = replace(workload, teacher=LLAMA, layout=Layout(devices=4, tensor=4))
    four_gpus = peak_memory(with_teacher, H100)
    assert four_gpus.teacher == pytest.approx(2 * LLAMA.parameters() / 4)
    cache = training_cost(replace(workload, trained=None, teacher=LLAMA), H100)
    assert cache.memory.optimizer == cache.memory.weights == cache.step.optimizer == 0
    assert cache.memory.teacher == 2 * LLAMA.parameters()


@pytest.mark.parametrize(("batches", "ranks", "size"), [(1, 1, 2), (2, 1, 4), (1, 2, 4)])
def test_a_cpu_holds_unsummed_gradients_in_bfloat16(batches: int, ranks: int, size: int) -> None:
    """Sums over micro batches or ranks are in float32."""
    layout = Layout(devices=ranks)
    workload = distillation(LLAMA, None, layout=layout, global_batch_size=batches * ranks)
    assert peak_memory(workload, CPU).gradients == size * LLAMA.parameters()
    assert peak_memory(workload, H100).gradients == 4 * LLAMA.parameters()


def test_copies_of_the_optimizer_take_memory_and_reduce_network_traffic() -> None:
    """With a copy on each of two nodes, a rank sends an eighth of the gradients between nodes.
    A parameter's 6 bytes are its gradient (4 bytes) and its weight (2 bytes)."""
    layout = Layout(nodes=2, devices=8)
    workload = distillation(LLAMA, None, layout=layout)
    with_copies = replace(workload, layout=replace(layout, optimizer_instances=2))
    size = LLAMA.parameters()
    assert peak_memory(with_copies, H100).optimizer == 12 * size / 8
    seconds = [step_time(run, H100).gradient_communication for run in (workload, with_copies)]
    link, network = H100.link_bytes_per_second, H100.network_bytes_per_second
    assert seconds[0] == pytest.approx(6 * size * 15 / 16 / network)
    assert seconds[1] == pytest.approx(6 * size * 7 / 8 / link + 4 * size / 8 / network)
    experts = distillation(with_experts(SMOLLM2), None, layout=Layout(devices=8, expert=4))
    assert step_time(experts, H100).expert_communication > 0


def test_tensor_parallel_experts_communicate_a_copy_of_a_token_for_each_of_its_experts() -> None:
    layout = Layout(devices=4, tensor=4, sequence_parallel=True)
    dense, moe = (
        step_time(distillation(arch, None, layout=layout), H100).tensor_communication
        for arch in (SMOLLM2, with_experts(SMOLLM2, moe_router_topk=6))
    )
    assert moe == pytest.approx(dense * (1 + 6) / 2)


def test_groups_that_span_nodes_communicate_at_the_rate_of_the_network() -> None:
    ratio = H100.link_bytes_per_second / H100.network_bytes_per_second
    experts = with_experts(SMOLLM2)
    for size, parts in (
        ({"tensor": 8}, ("tensor_communication", "expert_communication")),
        ({"tensor": 2, "context": 4}, ("context_communication",)),
        ({"tensor": 2, "expert": 4}, ("expert_communication",)),
    ):
        layouts = [
            Layout(nodes=64 // devices, devices=devices, **size)  # type: ignore[arg-type]
            for devices in (8, 4)
        ]
        one_node, two_nodes = (
            vars(step_time(distillation(experts, None, layout=layout), H100)) for layout in layouts
        )
        for part in parts:
            assert two_nodes[part] == pytest.approx(ratio * one_node[part])
        assert two_nodes["compute"] == one_node["compute"]


def test_context_parallel_ranks_send_keys_and_values_to_each_other() -> None:
    """A forward pass sends both once; a backward pass sends both with their gradients."""
    layout = Layout(devices=4, context=4)
    workload = distillation(LLAMA, LLAMA, layout=layout, global_batch_size=1, seq_length=32768)
    chunk_bytes = 32768 / 4 * 2 * 8 * 128 * 2  # keys and values of 8 groups in bfloat16
    transfers = (3 + 1) * 3 * 32  # student and teacher, 3 other ranks, 32 layers
    seconds = chunk_bytes * transfers / H100.link_bytes_per_second
    assert step_time(workload, H100).context_communication == pytest.approx(seconds)
    assert step_time(replace(workload, layout=Layout()), H100).context_communication == 0


def test_recomputing_and_sequence_parallelism_save_activations() -> None:
    layout = Layout(devices=8, tensor=2, micro_batch_size=2)
    workload = distillation(LLAMA, LLAMA, layout=layout)

    def activations(**changes: Any) -> float:
        return peak_memory(replace(workload, layout=replace(layout, **changes)), H100).activations

    assert activations(sequence_parallel=True) < activations()
    assert activations(recompute_granularity="full") < activations() / 7
    recomputed = replace(workload, layout=replace(layout, recompute_granularity="full"))
    assert step_time(recomputed, H100).compute > 1.2 * step_time(workload, H100).compute


def test_a_loss_on_hidden_states_keeps_them_in_float32_on_the_last_stage() -> None:
    layout = Layout(devices=4, tensor=2, pipeline=2, sequence_parallel=True, micro_batch_size=2)
    workload = distillation(replace(LLAMA, num_layers=16), LLAMA, layout=layout)
    compared = replace(workload, hidden_state_bytes=8 * 8)  # eight pairs on the last stage
    added = [
        stage_memory(compared, H100, n).activations - stage_memory(workload, H100, n).activations
        for n in range(2)
    ]
    tokens = 2 * 4096 / 2  # tensor-parallel ranks split the sequences
    assert added == pytest.approx([0, 8 * 8 * tokens * 4096])


def test_recomputed_feed_forward_layers_are_in_memory_one_at_a_time() -> None:
    layout = Layout(micro_batch_size=2, recompute_feed_forward=True)
    workload = distillation(LLAMA, LLAMA, layout=layout)
    stored_bytes = 2 * (4 * 4096 + 2 * 40 * 128)
    token_bytes = 32 * stored_bytes + 2 * 3 * 14336
    assert peak_memory(workload, H100).activations == 2 * 4096 * token_bytes
    without_recompute = replace(workload, layout=Layout(micro_batch_size=2))
    recomputed_flops = token_compute(workload).flops - token_compute(without_recompute).flops
    assert recomputed_flops == 32 * 6 * 4096 * 14336


def test_a_pipeline_holds_several_micro_batches_and_idles() -> None:
    layout = Layout(devices=4, pipeline=4, micro_batch_size=1)
    workload = distillation(LLAMA, None, layout=layout, global_batch_size=8)
    step = step_time(workload, H100)
    assert step.bubble == pytest.approx(step.compute * 3 / 8)
    layer = layer_activation_bytes(LLAMA, layout, 4096)
    many_batches = replace(workload, global_batch_size=64)
    # The first stage has 8 layers, and 4 micro batches in flight.
    assert stage_memory(many_batches, H100, 0).activations > 4 * 8 * layer
    # A stage keeps the teacher's hidden states that it received for each micro batch in flight (the
    # first stage: none), and one more buffer.
    with_teacher = replace(workload, teacher=LLAMA)
    state = 2 * 4096 * 4096
    for stage, kept_states in enumerate((1, 1 + 3, 1 + 2, 1 + 1)):
        with_states, without_states = (
            stage_memory(run, H100, stage).activations for run in (with_teacher, workload)
        )
        assert with_states - without_states == pytest.approx(kept_states * state)


def test_a_pipeline_is_as_fast_as_its_busiest_stage() -> None:
    """8 stages split 36 layers into 3, 5, 5, …; a head of 152k tokens costs nearly 3 layers."""
    workload = distillation(QWEN, None, layout=Layout(devices=8, pipeline=8, micro_batch_size=1))
    head = 2 * QWEN.vocab_size * QWEN.hidden_size
    layer = (forward_flops(QWEN, 4096) - head) / 36
    stages = [3 * layer, *[5 * layer] * 6, 3 * layer + head]
    assert pipeline_imbalance(workload) == pytest.approx(max(stages) * 8 / sum(stages))
    unsplit = replace(workload, layout=Layout(devices=8))
    assert pipeline_imbalance(unsplit) == pytest.approx(1)
    slower = step_time(workload, H100).compute / step_time(unsplit, H100).compute
    assert slower == pytest.approx(pipeline_imbalance(workload))


def test_logits_of_teacher_and_student_are_counted() -> None:
    workload = distillation(SMOLLM2, SMOLLM2, layout=Layout(micro_batch_size=4), seq_length=256)
    logits = 4 * 256 * 49152 * 2
    # The student's logits and the teacher's. The gradient overwrites the student's logits.
    assert peak_memory(workload, CPU).logits == 2 * logits
    assert peak_memory(replace(workload, terms=2), CPU).logits == 2 * logits
    assert peak_memory(replace(workload, teacher=None), CPU).logits == logits
    # On a GPU, the loss has two buffers, three with a live teacher, and one more per further term.
    chunk = peak_memory(replace(workload, teacher=None), H100).logits - logits  # of two buffers
    assert peak_memory(workload, H100).logits == 2 * logits + 3 * chunk / 2
    assert peak_memory(replace(workload, terms=2), H100).logits == 2 * logits + 4 * chunk / 2
    cache = replace(workload, trained=None)
    assert peak_memory(cache, CPU).logits == 2 * logits  # logits and a transposed copy
