"""Compares FLOPs, bytes and memory with hand counts; tests hardware profiles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launch.schema import CONF
from recipes.planning import hardware
from recipes.planning.training_cost import peak_memory, token_compute, update_bytes
from recipes.planning.transformer import (
    expert_parameters,
    layer_activation_bytes,
    loss_bytes,
    pass_compute,
    rank_parameters,
)
from recipes.planning.workload import Layout
from tests.unit.planning.models import (
    CPU,
    H100,
    LLAMA,
    SMOLLM2,
    TINY,
    distillation,
    profile,
    with_experts,
)


def test_memory_traffic_of_a_token_equals_a_hand_count() -> None:
    """A sequence has one token, in bfloat16.

    Terms are channels times bytes: norms and residuals, queries, keys, feed-forward layer. The
    backward pass also has one attention score.
    """
    queries = keys = 2  # channels of one head
    forward = 2 * 2 * (22 + 6) + queries * (24 + 12) + keys * (24 + 4) + 3 * 10
    backward = 2 * 2 * (68 + 6) + queries * (28 + 12 + 16 + 6) + keys * (28 + 8 + 6) + 3 * 22
    backward += 12 + 18 + 6  # the score
    # Attention takes 4 FLOPs per score and channel forward, and 10 backward. ``passes`` is 1 for a
    # forward pass, 3 with a backward pass, and 4 if the forward pass is also recomputed.
    for passes, traffic, attention in (
        (1, forward, 4 * 2),
        (3, forward + backward, 14 * 2),
        (4, 2 * forward + backward, 18 * 2),
    ):
        compute = pass_compute(TINY, 1, 2, passes)
        assert compute.bytes == traffic
        assert compute.blocked_attention_flops == attention
        assert compute.gemm_flops == passes * 2 * TINY.active_weights()
    # A vocabulary of 5 tokens. A live teacher adds 32 bytes for each, a second term of the loss 20.
    assert loss_bytes(5, 2, 1, live_teacher=False) == 5 * 60
    assert loss_bytes(5, 2, 2, live_teacher=True) == 5 * (60 + 32 + 20)
    # The gradient's norm, Adam and the new weight. A second micro batch adds 10 bytes.
    assert update_bytes(1, 2) == 2 + 26 + 6
    assert update_bytes(2, 2) == 10 + 2 + 26 + 6


@pytest.mark.parametrize("pipeline", [1, 2, 5])
@pytest.mark.parametrize("tied", [True, False])
def test_all_ranks_together_hold_the_whole_model(pipeline: int, tied: bool) -> None:
    """A pipeline holds tied embeddings twice: on the first and on the last stage."""
    arch = replace(LLAMA, num_layers=20, tied_embeddings=tied)
    layout = Layout(devices=2 * pipeline, tensor=2, pipeline=pipeline)
    # Two tensor-parallel ranks on each stage.
    parameters_of_ranks = 2 * sum(
        sum(rank_parameters(arch, layout, stage)) for stage in range(pipeline)
    )
    copied_embeddings = arch.vocab_size * arch.hidden_size if tied and pipeline > 1 else 0
    assert parameters_of_ranks == pytest.approx(arch.parameters() + copied_embeddings)


def test_activations_of_a_layer_equal_a_hand_count() -> None:
    """A token of Llama 3.1 8B keeps bfloat16 tensors of three operations.

    - Two norms: inputs and outputs of 4,096 channels.
    - Attention: queries and output of 32 heads, keys and values of 8 groups, with 128 channels.
    - Feed-forward layer: three tensors of 14,336 channels.
    """
    values = 4 * 4096 + 2 * (32 + 8) * 128 + 3 * 14336
    assert layer_activation_bytes(LLAMA, Layout(), 1) == 2 * values
    tensor_parallel = 2 * (4 * 4096 + (2 * 40 * 128 + 3 * 14336) / 2)
    assert layer_activation_bytes(LLAMA, Layout(devices=2, tensor=2), 1) == tensor_parallel
    sequence_parallel = Layout(devices=2, tensor=2, sequence_parallel=True)
    assert layer_activation_bytes(LLAMA, sequence_parallel, 1) == values


def test_recomputed_feed_forward_layers_are_in_memory_one_at_a_time() -> None:
    recomputed = Layout(micro_batch_size=2, recompute_feed_forward=True)
    # Per token and layer, in bfloat16: two norms, and attention with 32 heads and 8 groups of 128.
    stored_bytes = 2 * (4 * 4096 + 2 * 40 * 128)
    assert layer_activation_bytes(LLAMA, recomputed, 1) == stored_bytes
    workload = distillation(LLAMA, LLAMA, layout=recomputed)
    token_bytes = 32 * stored_bytes + 2 * 3 * 14336  # with one feed-forward layer
    assert peak_memory(workload, H100).activations == 2 * 4096 * token_bytes
    without_recompute = replace(workload, layout=Layout(micro_batch_size=2))
    recomputed_flops = token_compute(workload).flops - token_compute(without_recompute).flops
    assert recomputed_flops == 32 * 6 * 4096 * 14336  # three GEMMs in each of 32 layers


def test_logits_of_teacher_and_student_are_counted() -> None:
    workload = distillation(SMOLLM2, SMOLLM2, layout=Layout(micro_batch_size=4), seq_length=256)
    logits = 4 * 256 * 49152 * 2  # bytes of one model's logits for a micro batch, in bfloat16
    # The student's logits and the teacher's. The gradient overwrites the student's logits.
    assert peak_memory(workload, CPU).logits == 2 * logits
    assert peak_memory(replace(workload, terms=2), CPU).logits == 2 * logits
    assert peak_memory(replace(workload, teacher=None), CPU).logits == logits
    # On a GPU, the loss has two buffers, three with a live teacher, and one more per further term.
    buffer = (peak_memory(replace(workload, teacher=None), H100).logits - logits) / 2
    assert peak_memory(workload, H100).logits == 2 * logits + 3 * buffer
    assert peak_memory(replace(workload, terms=2), H100).logits == 2 * logits + 4 * buffer
    cache = replace(workload, trained=None)
    assert peak_memory(cache, CPU).logits == 2 * logits  # logits and a transposed copy


def test_experts_are_split_and_two_of_them_are_active_for_a_token() -> None:
    arch = with_experts(SMOLLM2)
    # 30 layers of 8 experts, each with three matrices.
    assert expert_parameters(arch) == 30 * 8 * 3 * 576 * 128
    _, _, experts = rank_parameters(arch, Layout(devices=8, expert=4), 0)
    assert experts == expert_parameters(arch) / 4
    # Norms, inputs of two experts, 9 and 3 heads of 64, and four tensors in each expert.
    values = 4 * 576 + 2 * 576 + 2 * (9 + 3) * 64 + 4 * 2 * 128
    assert layer_activation_bytes(arch, Layout(), 1) == 2 * values
    # Tensor and sequence parallelism split all values except the experts' inputs.
    split_values = 4 * 576 + 2 * (9 + 3) * 64 + 4 * 2 * 128
    rank_values = split_values / 3 + 2 * 576
    three_ranks = Layout(devices=3, tensor=3, sequence_parallel=True)
    assert layer_activation_bytes(arch, three_ranks, 1) == pytest.approx(2 * rank_values)


PROFILES = sorted(path.stem for path in (CONF / "hardware").glob("*.yaml"))


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_are_complete_and_plausible(name: str) -> None:
    hardware_profile = profile(name)
    assert hardware_profile.name == name
    on_gpu = name != "cpu"
    assert hardware_profile.on_gpu == on_gpu
    assert (hardware_profile.bandwidth_fraction is None) == on_gpu
    assert hardware_profile.measure != on_gpu  # a plan measures only a CPU's rates
    assert 0 < hardware_profile.utilisation <= 1
    assert hardware_profile.memory_of_rank(1) > 1e9
    # A comment at the start describes the hardware.
    assert (CONF / "hardware" / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("flags : fpu avx2 avx512f avx512_bf16 fma", "bf16-mixed"),
        ("flags : fpu amx_bf16 amx_tile", "bf16-mixed"),
        ("Features : fp asimd bf16", "bf16-mixed"),
        ("flags : fpu avx avx2 fma", "32"),
        (None, "32"),
    ],
)
def test_only_processors_with_bfloat16_instructions_train_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str | None, precision: str
) -> None:
    """``flags`` is a line of ``/proc/cpuinfo``; ``None`` for systems without this file."""
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    assert hardware.cpu_profile("precision") == precision
    defaults = hardware.Hardware()  # the rates of a processor with bfloat16 instructions
    rates = [hardware.cpu_profile(key) for key in ("flops_per_second", "bytes_per_second")]
    default_rates = [defaults.flops_per_second, defaults.bytes_per_second]
    assert (rates == default_rates) == (precision == "bf16-mixed")
