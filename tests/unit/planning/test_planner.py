"""The planner against what was published, and against what was measured here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from omegaconf import OmegaConf

from launch import schema
from launch.schema import CONF
from nemo_convert.architecture import Architecture
from nemo_convert.hf_config import read_architecture
from nemo_convert.smollm2 import HF_CONFIG
from recipes.planning.estimate import (
    activation_bytes,
    estimate,
    expert_parameters,
    flops_per_token,
    forward_flops,
    memory,
    rank_parameters,
    stage_memory,
    step_seconds,
    stopping_seconds,
    token_work,
    unevenness,
)
from recipes.planning.hardware import CPU_PROFILES, Hardware
from recipes.planning.layouts import best, fits, proposals
from recipes.planning.published_configs import CONFIGS
from recipes.planning.tables import figures, tables
from recipes.planning.work import PASS_SECONDS, loss_bytes, passes_of
from recipes.planning.workload import Layout, Workload

PROFILES = sorted(path.stem for path in (CONF / "hardware").glob("*.yaml"))


def profile(name: str) -> Hardware:
    schema.register()
    cfg = OmegaConf.merge(
        OmegaConf.structured(Hardware), OmegaConf.load(CONF / "hardware" / f"{name}.yaml")
    )
    hardware: Hardware = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    return hardware


def dense(model: str, **changes: Any) -> Architecture:
    """A bundled model's shape, changed."""
    return replace(read_architecture(CONFIGS[model], model), **changes)


H100, CPU = profile("h100"), profile("cpu")
LLAMA, QWEN = dense("meta-llama/Llama-3.1-8B"), dense("Qwen/Qwen3-8B")
NODES_96 = Layout(nodes=96, devices=8, tensor=8, micro_batch_size=2, sequence_parallel=True)
SMOLLM2 = read_architecture(HF_CONFIG, "smollm2")


def distillation(student: Architecture, teacher: Architecture | None, **settings: Any) -> Workload:
    defaults = {"layout": NODES_96, "seq_length": 4096, "global_batch_size": 768, "steps": 28_610}
    return Workload("distill", student, teacher, **(defaults | settings))


def hybrid_as_dense(layers: int, hidden: int, parameters: float) -> Architecture:
    """A stand-in for a hybrid of Mamba, attention and feed-forward blocks (Nemotron Nano v2).

    Two blocks count as one transformer layer, the feed-forward width makes up for what is missing
    of the published number of parameters, so products of activations with weights are right. Scans
    of Mamba are not counted; attention is in every layer instead of in 4.
    """
    bare = Architecture("", layers, hidden, 0, 40, 8, 128, 131072, 131072, tied_embeddings=False)
    width = (parameters - bare.parameters()) / (3 * hidden * layers)
    return replace(bare, ffn_hidden_size=int(width))


@pytest.mark.parametrize(
    ("job", "published", "error", "tolerance"),
    [
        # NVIDIA's blog of 7 October 2025, "about 6,000"; this one the utilisation was chosen for.
        (distillation(replace(QWEN, num_layers=24), QWEN), 6000, -0.03, 0.05),
        # NVIDIA/Model-Optimizer#861: 28,500 steps, "~5.2k", and 16,000 steps, "~3k".
        (
            distillation(
                replace(QWEN, num_layers=30, hidden_size=3584, ffn_hidden_size=11776),
                QWEN,
                layout=replace(NODES_96, micro_batch_size=8),
                steps=28_500,
            ),
            5200,
            0.16,
            0.20,
        ),
        (
            distillation(
                replace(QWEN, num_layers=30, hidden_size=3584, ffn_hidden_size=11776),
                QWEN,
                layout=replace(NODES_96, micro_batch_size=8),
                steps=16_000,
            ),
            3000,
            0.13,
            0.20,
        ),
        # The tutorial of Nemotron-Nano-9B-v2 there: "~9k". Mamba's scans are not in the formulas
        # and do not reach a dense model's utilisation: the estimate is a third too low.
        (
            distillation(
                hybrid_as_dense(24, 4352, 7.00e9),
                hybrid_as_dense(28, 4480, 8.89e9),
                layout=replace(NODES_96, micro_batch_size=4),
                seq_length=8192,
                steps=12_800,
            ),
            9000,
            -0.36,
            0.40,
        ),
    ],
    ids=["qwen3-depth", "qwen3-nas-90B", "qwen3-nas-50B", "nemotron-nano-hybrid"],
)
def test_published_gpu_hours(
    job: Workload, published: float, error: float, tolerance: float
) -> None:
    found = estimate(job, H100).device_hours / published - 1
    assert found == pytest.approx(error, abs=0.015)
    assert abs(found) <= tolerance


def test_time_to_stop_has_room_for_what_must_still_be_done() -> None:
    """Two steps, a validation that only goes forward, and 14 bytes of each parameter saved."""
    student = replace(QWEN, num_layers=24)
    job = distillation(student, QWEN, validation_batches=32)
    step = step_seconds(job, H100).total
    forward = [forward_flops(arch, 4096) for arch in (student, QWEN)]
    validation = 32 * step * sum(forward) / (3 * forward[0] + forward[1])
    save = 14 * student.parameters() / 5e8
    assert stopping_seconds(job, H100) == pytest.approx(2 * step + validation + save)
    assert stopping_seconds(replace(job, trained=None), H100) == 0
    [time] = [table for table in tables({"distill": job}, H100) if table.columns[-1] == "to stop"]
    assert time.rows[0][-1] == f"{2 * step + validation + save:.3g}"


EPYC, XEON, XEON_CORE, AVX2 = (
    {"flops_per_second": bf16, "float32_flops_per_second": f32, "bytes_per_second": copy}
    for bf16, f32, copy in (
        (4.02e11, 1.87e11, 2.9e10),
        (1.71e12, 3.11e11, 2.58e10),
        (8.54e11, 1.65e11, 1.25e10),  # one core, as the next
        (1e10, 9.1e10, 2.03e10),
    )
)
"""Rates that were measured beside these trainings."""
DEEP = replace(SMOLLM2, num_layers=24)
NARROW = replace(SMOLLM2, hidden_size=512, ffn_hidden_size=1152)


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
def test_time_of_a_step_on_a_cpu(
    rates: dict[str, float],
    bf16: bool,
    teacher: Architecture | None,
    student: Architecture,
    terms: int,
    tokens_per_second: float,
) -> None:
    """``benchmarks/README.md``: within 15% on three kinds of processors."""
    job = cpu_training(student, teacher, bf16=bf16, terms=terms)
    found = estimate(job, replace(CPU, **rates)).tokens_per_second
    assert found == pytest.approx(tokens_per_second, rel=0.15)


@pytest.mark.parametrize(
    ("bf16", "teacher", "peak_bytes"),
    [(True, SMOLLM2, 3.5e9), (True, None, 3.1e9), (False, SMOLLM2, 4.5e9)],
    ids=["live", "cached", "live-float32"],
)
def test_memory_of_a_training_on_a_cpu(
    bf16: bool, teacher: Architecture | None, peak_bytes: float
) -> None:
    """``benchmarks.distill``: within 5%."""
    job = cpu_training(DEEP, teacher, bf16=bf16)
    if teacher is not None:
        assert flops_per_token(job) == pytest.approx(979e6, rel=0.01)
    assert estimate(job, CPU).memory.total == pytest.approx(peak_bytes, rel=0.05)


def cpu_training(student: Architecture, teacher: Architecture | None, **fields: Any) -> Workload:
    """Ten steps of 4 windows of 256 tokens."""
    shape = {"seq_length": 256, "global_batch_size": 4, "steps": 10}
    return distillation(student, teacher, layout=Layout(micro_batch_size=4), **shape, **fields)


def test_float32_takes_longer_than_bfloat16_on_any_device() -> None:
    job = distillation(SMOLLM2, SMOLLM2, layout=Layout(), seq_length=256, global_batch_size=4)
    cpu = replace(CPU, **CPU_PROFILES[True])
    for hardware, least in ((cpu, 1.5), (H100, 10)):
        full = estimate(replace(job, bf16=False), hardware).hours
        assert full > least * estimate(job, hardware).hours


def test_a_cpus_time_between_products_is_memory_traffic_by_hand() -> None:
    """One layer of one head of two channels, in windows of one token, in bfloat16."""
    tiny = Architecture("", 1, 2, 3, 1, 1, 2, 5, 8, tied_embeddings=True)
    heads = keys = 2
    forward = 2 * 2 * (22 + 6) + heads * (24 + 12) + keys * (24 + 4) + 3 * 10
    backward = 2 * 2 * (68 + 6) + heads * (28 + 12 + 16 + 6) + keys * (28 + 8 + 6)
    backward += (12 + 18 + 6) + 3 * 22
    assert passes_of(tiny, 1, 2, 1).bytes == forward
    assert passes_of(tiny, 1, 2, 3).bytes == forward + backward
    assert passes_of(tiny, 1, 2, 4).bytes == 2 * forward + backward
    assert passes_of(tiny, 1, 2, 1).square == 4 * 2
    assert passes_of(tiny, 1, 2, 3).square == 14 * 2
    job = distillation(tiny, None, layout=Layout(), seq_length=1, global_batch_size=1)
    token = forward + backward + loss_bytes(5, 2, 1, live=False)
    products = 3 * tiny.forward_flops_per_token() / 10 + 14 * 2 / (0.6 * 5)  # in float32's
    rates = {"flops_per_second": 10.0, "float32_flops_per_second": 5.0, "bytes_per_second": 4.0}
    cpu = replace(CPU, **rates, traffic_share=0.5)
    step = step_seconds(job, cpu)
    assert step.compute == pytest.approx(products + token / 2 + 3 * PASS_SECONDS)
    assert step.optimizer == pytest.approx(tiny.parameters() * (2 + 26 + 6) / 2)
    twice = step_seconds(replace(job, global_batch_size=2), cpu)
    assert twice.optimizer == pytest.approx(tiny.parameters() * (10 + 2 + 26 + 6) / 2)


@pytest.mark.parametrize(
    ("model", "changes", "published"),
    [
        ("meta-llama/Llama-3.1-8B", {}, 8.03e9),
        ("meta-llama/Llama-3.1-8B", {"hidden_size": 3072, "ffn_hidden_size": 9216}, 4.51e9),
        ("meta-llama/Llama-3.1-8B", {"num_layers": 16}, 4.54e9),
        ("Qwen/Qwen3-8B", {}, 8.19e9),
        (
            "Qwen/Qwen3-8B",
            {"num_layers": 30, "hidden_size": 3584, "ffn_hidden_size": 11776},
            5.99e9,
        ),
        ("mistralai/Mistral-Nemo-Base-2407", {}, 12.25e9),
        (
            "mistralai/Mistral-Nemo-Base-2407",
            {"hidden_size": 4096, "ffn_hidden_size": 11520},
            8.41e9,
        ),
    ],
)
def test_bundled_shapes_have_the_published_parameters(
    model: str, changes: dict[str, int], published: float
) -> None:
    assert dense(model, **changes).parameters() == pytest.approx(published, rel=0.002)


@pytest.mark.parametrize("pipeline", [1, 2, 5])
@pytest.mark.parametrize("tied", [True, False])
def test_ranks_hold_the_whole_model(pipeline: int, tied: bool) -> None:
    """Over all stages and tensor ranks; a tied table is on the first stage and on the last."""
    arch = replace(LLAMA, num_layers=20, tied_embeddings=tied)
    layout = Layout(devices=2 * pipeline, tensor=2, pipeline=pipeline)
    held = 2 * sum(sum(rank_parameters(arch, layout, stage)) for stage in range(pipeline))
    twice = arch.vocab_size * arch.hidden_size if tied and pipeline > 1 else 0
    assert held == pytest.approx(arch.parameters() + twice)


def test_bytes_of_a_parameter_are_those_of_megatron() -> None:
    """18 bytes on one rank: bf16 weight, float32 gradient, main weight and two moments."""
    job = distillation(LLAMA, None, layout=Layout())
    found = memory(job, H100)
    assert found.weights + found.gradients + found.optimizer == 18 * LLAMA.parameters()
    many = memory(replace(job, layout=Layout(nodes=2, devices=8)), H100)
    assert many.optimizer == 12 * LLAMA.parameters() / 16
    on_cpu = memory(replace(job, layout=Layout(devices=4)), CPU)
    assert on_cpu.optimizer == 12 * LLAMA.parameters() / 4
    full = memory(replace(job, bf16=False), CPU)
    assert full.weights + full.gradients + full.optimizer == 16 * LLAMA.parameters()


@pytest.mark.parametrize(("batches", "layout", "size"), [(1, 1, 2), (2, 1, 4), (1, 2, 4)])
def test_a_cpu_keeps_gradients_that_nothing_is_added_to(
    batches: int, layout: int, size: int
) -> None:
    """In bfloat16, as they are made; those of micro batches and ranks are added in float32."""
    job = distillation(
        LLAMA, None, layout=Layout(devices=layout), global_batch_size=batches * layout
    )
    assert memory(job, CPU).gradients == size * LLAMA.parameters()
    assert memory(job, H100).gradients == 4 * LLAMA.parameters()


def test_copies_of_the_optimizer_take_memory_and_spare_the_network() -> None:
    """A copy on each of two nodes: weights are gathered within it, an eighth of gradients goes."""
    whole = Layout(nodes=2, devices=8)
    job = distillation(LLAMA, None, layout=whole)
    copied = replace(job, layout=replace(whole, optimizer_instances=2))
    size = LLAMA.parameters()
    assert memory(copied, H100).optimizer == 12 * size / 8
    seconds = [step_seconds(each, H100).gradient_communication for each in (job, copied)]
    link, network = H100.link_bytes_per_second, H100.network_bytes_per_second
    assert seconds[0] == pytest.approx(6 * size * 15 / 16 / network)
    assert seconds[1] == pytest.approx(6 * size * 7 / 8 / link + 4 * size / 8 / network)


def test_the_teacher_is_split_as_the_student_is() -> None:
    job = distillation(replace(LLAMA, num_layers=16), LLAMA, layout=Layout(devices=4, tensor=4))
    assert memory(job, H100).teacher == pytest.approx(2 * LLAMA.parameters() / 4)


def test_activations_of_a_layer_by_hand() -> None:
    """One token of Llama 3.1 8B: 4 x 4096, 2 x (32 + 8) x 128 and 3 x 14336 numbers of 2 bytes."""
    numbers = 4 * 4096 + 2 * 40 * 128 + 3 * 14336
    assert activation_bytes(LLAMA, Layout(), 1) == 2 * numbers
    split = 2 * (4 * 4096 + (2 * 40 * 128 + 3 * 14336) / 2)
    assert activation_bytes(LLAMA, Layout(devices=2, tensor=2), 1) == split
    whole = Layout(devices=2, tensor=2, sequence_parallel=True)
    assert activation_bytes(LLAMA, whole, 1) == numbers


def test_recomputing_and_sequence_parallelism_save_activations() -> None:
    layout = Layout(devices=8, tensor=2, micro_batch_size=2)
    job = distillation(LLAMA, LLAMA, layout=layout)

    def held(**changes: Any) -> float:
        return memory(replace(job, layout=replace(layout, **changes)), H100).activations

    assert held(sequence_parallel=True) < held()
    assert held(recompute_granularity="full") < held() / 7
    again = replace(job, layout=replace(layout, recompute_granularity="full"))
    assert step_seconds(again, H100).compute > 1.2 * step_seconds(job, H100).compute


def test_recomputing_the_feed_forward_part_by_hand() -> None:
    """Of a layer 43,008 of 69,632 numbers, for 6 x 4096 x 14336 FLOPs more."""
    layout = Layout(micro_batch_size=2)
    again = replace(layout, recompute_feed_forward=True)
    kept = 2 * (4 * 4096 + 2 * 40 * 128)
    assert activation_bytes(LLAMA, again, 1) == kept
    jobs = [distillation(LLAMA, LLAMA, layout=each) for each in (layout, again)]
    held = [memory(job, H100).activations for job in jobs]
    tokens = 2 * 4096
    assert held[1] == tokens * (32 * kept + 2 * 3 * 14336)  # one layer's are there again
    assert held[1] < 0.42 * held[0]
    before, after = map(token_work, jobs)
    assert after.flops - before.flops == 32 * 6 * 4096 * 14336


def test_a_pipeline_holds_several_micro_batches_and_waits() -> None:
    layout = Layout(devices=4, pipeline=4, micro_batch_size=1)
    job = distillation(replace(LLAMA, num_layers=32), None, layout=layout, global_batch_size=8)
    step = step_seconds(job, H100)
    assert step.bubble == pytest.approx(step.compute * 3 / 8)
    layer = activation_bytes(LLAMA, layout, 4096)
    first = replace(job, global_batch_size=64)
    assert memory(first, replace(H100, reserved_bytes=0)).total > 4 * 8 * layer


def test_a_pipeline_holds_what_its_stages_send_each_other() -> None:
    layout = Layout(devices=4, pipeline=4, micro_batch_size=1)
    alone = distillation(LLAMA, None, layout=layout, global_batch_size=8)
    taught = replace(alone, teacher=LLAMA)
    state = 2 * 4096 * 4096
    for stage, messages in enumerate((1, 1 + 3, 1 + 2, 1 + 1)):
        both, one = (stage_memory(job, H100, stage).activations for job in (taught, alone))
        assert both - one == pytest.approx(messages * state)


def test_a_pipeline_is_as_fast_as_its_fullest_stage() -> None:
    """36 layers over 8 stages are 3, 5, 5, …; a head of 152k words is nearly 3 layers."""
    job = distillation(QWEN, None, layout=Layout(devices=8, pipeline=8, micro_batch_size=1))
    head = 2 * QWEN.vocab_size * QWEN.hidden_size
    layer = (forward_flops(QWEN, 4096) - head) / 36
    assert 2.9 < head / layer < 3
    stages = [3 * layer, *[5 * layer] * 6, 3 * layer + head]
    assert unevenness(job) == pytest.approx(max(stages) * 8 / sum(stages))
    one = replace(job, layout=Layout(devices=8))
    assert unevenness(one) == pytest.approx(1)
    slower = step_seconds(job, H100).compute / step_seconds(one, H100).compute
    assert slower == pytest.approx(unevenness(job))


def test_logits_of_teacher_and_student_are_counted() -> None:
    job = distillation(SMOLLM2, SMOLLM2, layout=Layout(micro_batch_size=4), seq_length=256)
    one = 4 * 256 * 49152 * 2
    assert memory(job, CPU).logits == 2 * one  # the gradient is written over the student's
    assert memory(replace(job, terms=2), CPU).logits == 2 * one  # and is the sum of the terms'
    assert memory(replace(job, teacher=None), CPU).logits == one
    chunk = memory(replace(job, teacher=None), H100).logits - one
    assert memory(job, H100).logits == 2 * one + 3 * chunk / 2  # of two models' log-probabilities
    assert memory(replace(job, terms=2), H100).logits == 2 * one + 4 * chunk / 2
    assert memory(replace(job, trained=None), CPU).logits == 2 * one  # and with the batch first


def test_experts_are_split_over_replicas_and_few_of_them_work() -> None:
    shape = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 128}
    arch = replace(SMOLLM2, **shape)
    assert expert_parameters(arch) == 30 * 8 * 3 * 576 * 128
    layout = Layout(devices=8, expert=4)
    _, experts = rank_parameters(arch, layout, 0)
    assert experts == expert_parameters(arch) / 4
    job = distillation(arch, None, layout=layout, seq_length=256, global_batch_size=8)
    assert step_seconds(job, H100).expert_communication > 0
    # Of two experts a token, their input, four halves or products; heads are 9 and 3, of 64.
    numbers = 4 * 576 + 2 * 576 + 2 * (9 + 3) * 64 + 4 * 2 * 128
    assert activation_bytes(arch, Layout(), 1) == 2 * numbers
    split = (4 * 576 + 2 * (9 + 3) * 64 + 4 * 2 * 128) / 3 + 2 * 576  # gathered, where it is split
    thirds = Layout(devices=3, tensor=3, sequence_parallel=True)
    assert activation_bytes(arch, thirds, 1) == pytest.approx(2 * split)


def test_a_pass_of_a_teacher_has_no_optimizer() -> None:
    job = replace(distillation(LLAMA, LLAMA, layout=Layout()), trained=None)
    found = estimate(job, H100)
    assert found.memory.optimizer == found.memory.weights == found.step.optimizer == 0
    assert found.memory.teacher == 2 * LLAMA.parameters()


def test_a_job_survives_being_written() -> None:
    job = distillation(replace(QWEN, num_layers=24), QWEN)
    assert Workload.of(job.as_dict()) == job
    assert Workload.of(replace(job, teacher=None).as_dict()).teacher is None


def test_proposals_fit_and_the_first_is_the_cheapest() -> None:
    job = distillation(replace(LLAMA, num_layers=16), LLAMA, layout=Layout(devices=8), steps=100)
    found = proposals(job, H100)
    assert found
    assert all(fits(p.job, H100) for p in found)
    dollars = [p.estimate.dollars for p in found]
    assert dollars == sorted(dollars)
    assert best(job, replace(H100, memory_bytes=8e9), 8, 8) is None
    small = best(job, replace(H100, memory_bytes=24e9), 8, 8)
    assert small is not None
    assert small.estimate.memory.total < 24e9


def test_a_mixture_is_split_by_the_width_of_its_experts() -> None:
    """The width of a dense layer is in its config too, and of no weight."""
    shape = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 96}
    arch = replace(LLAMA, ffn_hidden_size=30, **shape)
    layout = Layout(devices=8, tensor=8, sequence_parallel=True)
    job = distillation(arch, None, layout=layout, global_batch_size=8)
    assert fits(job, H100)
    assert not fits(replace(job, trained=replace(arch, moe_ffn_hidden_size=100)), H100)
    assert not fits(replace(job, layout=replace(layout, tensor=1, expert=3, devices=3)), H100)


def test_what_a_loss_on_hidden_states_refuses_is_not_proposed() -> None:
    """Where memory is so small that recomputing is all that fits, nothing is left to propose."""
    layout, shape = Layout(devices=8), replace(LLAMA, num_layers=16)
    job = distillation(shape, LLAMA, layout=layout, seq_length=8192, steps=100)
    small = replace(H100, memory_bytes=22e9)
    found = best(job, small, 8, 8)
    assert found is not None
    assert found.job.layout.recompute_granularity == "full"
    hidden = replace(job, compares_hidden_states=True)
    assert best(hidden, small, 8, 8) is None
    every = proposals(hidden, H100)
    assert every
    assert {(p.job.layout.recompute_granularity, p.job.layout.pipeline) for p in every} == {
        ("none", 1)
    }


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_are_whole_and_plausible(name: str) -> None:
    hardware = profile(name)
    assert hardware.name == name
    assert hardware.on_gpu == (name != "cpu")
    assert 0 < hardware.utilisation <= 1
    assert hardware.on_gpu == (hardware.traffic_share is None)
    assert hardware.on_gpu != hardware.measure
    assert hardware.memory_of_rank(1) > 1e9
    assert (CONF / "hardware" / f"{name}.yaml").read_text().startswith("# ")


def test_tables_have_a_cell_for_each_column() -> None:
    jobs = {"distill": distillation(replace(QWEN, num_layers=24), QWEN)}
    made = tables(jobs, H100)
    assert [t.title.split(",")[0] for t in made][-1] == "Layouts of distill that fit"
    for table in made:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}
    found = figures(jobs, H100, from_published_config=True)
    assert found["device-hours"] == pytest.approx(5826, abs=2)
    assert found["dollars"] == pytest.approx(3 * found["device-hours"], rel=0.001)
    assert "out of reach" in found["shape of the teacher"]
