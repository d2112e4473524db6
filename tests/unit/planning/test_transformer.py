"""Compares FLOPs, bytes and memory with hand counts; tests hardware profiles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launch.schema import CONF
from nemo_convert.architecture import Architecture
from recipes.planning import hardware
from recipes.planning.training_cost import update_bytes
from recipes.planning.transformer import (
    expert_parameters,
    feed_forward_recompute,
    layer_activation_bytes,
    loss_bytes,
    pass_compute,
    rank_parameters,
)
from recipes.planning.workload import Layout
from tests.unit.planning.models import LLAMA, SMOLLM2, profile, published, with_experts

WIDE, QWEN_NAS, MISTRAL = (
    {"hidden_size": 3072, "ffn_hidden_size": 9216},
    {"num_layers": 30, "hidden_size": 3584, "ffn_hidden_size": 11776},
    {"hidden_size": 4096, "ffn_hidden_size": 11520},
)


@pytest.mark.parametrize(
    ("model", "changes", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B", {}, 8.03e9),
        ("meta-llama/Llama-3.1-8B", WIDE, 4.51e9),
        ("meta-llama/Llama-3.1-8B", {"num_layers": 16}, 4.54e9),
        ("Qwen/Qwen3-8B", {}, 8.19e9),
        ("Qwen/Qwen3-8B", QWEN_NAS, 5.99e9),
        ("mistralai/Mistral-Nemo-Base-2407", {}, 12.25e9),
        ("mistralai/Mistral-Nemo-Base-2407", MISTRAL, 8.41e9),
    ],
)
def test_bundled_shapes_have_the_published_parameters(
    model: str, changes: dict[str, int], parameters: float
) -> None:
    arch = replace(published(model), **changes)  # type: ignore[arg-type]
    assert arch.parameters() == pytest.approx(parameters, rel=0.002)


def test_memory_traffic_of_a_token_equals_a_hand_count() -> None:
    """The model has one layer with one head of two channels; one token; bfloat16.

    Terms are channels times bytes: norms and residuals, queries, keys, scores (in the backward
    pass only), feed-forward.
    """
    tiny = Architecture("", 1, 2, 3, 1, 1, 2, 5, 8, tied_embeddings=True)
    heads = keys = 2
    forward = 2 * 2 * (22 + 6) + heads * (24 + 12) + keys * (24 + 4) + 3 * 10
    backward = 2 * 2 * (68 + 6) + heads * (28 + 12 + 16 + 6) + keys * (28 + 8 + 6)
    backward += (12 + 18 + 6) + 3 * 22
    # Attention takes 4 FLOPs per score and channel forward, and 10 backward.
    for passes, traffic, attention in (
        (1, forward, 4 * 2),
        (3, forward + backward, 14 * 2),
        (4, 2 * forward + backward, 18 * 2),
    ):
        compute = pass_compute(tiny, 1, 2, passes)
        assert compute.bytes == traffic
        assert compute.blocked_attention_flops == attention
        assert compute.gemm_flops == passes * 2 * tiny.active_weights()
    assert loss_bytes(5, 2, 1, live_teacher=False) == 5 * 60
    assert loss_bytes(5, 2, 2, live_teacher=True) == 5 * (60 + 32 + 20)
    assert update_bytes(1, 2) == 2 + 26 + 6
    assert update_bytes(2, 2) == 10 + 2 + 26 + 6


@pytest.mark.parametrize("pipeline", [1, 2, 5])
@pytest.mark.parametrize("tied", [True, False])
def test_all_ranks_together_hold_the_whole_model(pipeline: int, tied: bool) -> None:
    """A pipeline holds tied embeddings twice: on the first and on the last stage."""
    arch = replace(LLAMA, num_layers=20, tied_embeddings=tied)
    layout = Layout(devices=2 * pipeline, tensor=2, pipeline=pipeline)
    parameters_of_ranks = 2 * sum(
        sum(rank_parameters(arch, layout, stage)) for stage in range(pipeline)
    )
    copied_embeddings = arch.vocab_size * arch.hidden_size if tied and pipeline > 1 else 0
    assert parameters_of_ranks == pytest.approx(arch.parameters() + copied_embeddings)


def test_activations_of_a_layer_equal_a_hand_count() -> None:
    """A token of Llama 3.1 8B keeps tensors of norms, attention and the feed-forward layer."""
    values = 4 * 4096 + 2 * (32 + 8) * 128 + 3 * 14336
    assert layer_activation_bytes(LLAMA, Layout(), 1) == 2 * values
    tensor_parallel = 2 * (4 * 4096 + (2 * 40 * 128 + 3 * 14336) / 2)
    assert layer_activation_bytes(LLAMA, Layout(devices=2, tensor=2), 1) == tensor_parallel
    sequence_parallel = Layout(devices=2, tensor=2, sequence_parallel=True)
    assert layer_activation_bytes(LLAMA, sequence_parallel, 1) == values
    recomputed = Layout(recompute_feed_forward=True)
    assert layer_activation_bytes(LLAMA, recomputed, 1) == 2 * (4 * 4096 + 2 * 40 * 128)
    assert feed_forward_recompute(LLAMA, 2).flops == 32 * 6 * 4096 * 14336


def test_experts_are_split_and_two_of_them_are_active_for_a_token() -> None:
    arch = with_experts(SMOLLM2)
    assert expert_parameters(arch) == 30 * 8 * 3 * 576 * 128
    _, experts = rank_parameters(arch, Layout(devices=8, expert=4), 0)
    assert experts == expert_parameters(arch) / 4
    # Norms, inputs of two experts, 9 and 3 heads of 64, and four tensors in each expert.
    values = 4 * 576 + 2 * 576 + 2 * (9 + 3) * 64 + 4 * 2 * 128
    assert layer_activation_bytes(arch, Layout(), 1) == 2 * values
    gathered_values = (
        4 * 576 + 2 * (9 + 3) * 64 + 4 * 2 * 128
    ) / 3 + 2 * 576  # inputs are gathered
    three_ranks = Layout(devices=3, tensor=3, sequence_parallel=True)
    assert layer_activation_bytes(arch, three_ranks, 1) == pytest.approx(2 * gathered_values)


PROFILES = sorted(path.stem for path in (CONF / "hardware").glob("*.yaml"))


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_are_complete_and_plausible(name: str) -> None:
    device = profile(name)
    assert device.name == name
    on_gpu = name != "cpu"
    assert device.on_gpu == on_gpu
    assert (device.bandwidth_fraction is None) == on_gpu
    assert device.measure != on_gpu
    assert 0 < device.utilisation <= 1
    assert device.memory_of_rank(1) > 1e9
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
def test_only_processors_with_bfloat16_instructions_train_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str | None, precision: str
) -> None:
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    assert hardware.cpu_profile("precision") == precision
    defaults = hardware.Hardware()  # the rates of a processor with bfloat16 instructions
    rates = [hardware.cpu_profile(n) for n in ("flops_per_second", "bytes_per_second")]
    default_rates = [defaults.flops_per_second, defaults.bytes_per_second]
    assert (rates == default_rates) == (precision == defaults.precision)
