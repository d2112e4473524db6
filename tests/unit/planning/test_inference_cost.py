"""Compares the estimated cost of stages that do not train with hand counts and measurements."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from launch.planned import load_stage
from nemo_convert.architecture import Architecture
from recipes.core.stage import Resources
from recipes.distillation.settings import CacheLogitsConfig
from recipes.evaluation.settings import EvaluateConfig
from recipes.planning.inference_cost import (
    InferenceCost,
    Sequences,
    comparison_cost,
    conversion_cost,
    healing_cost,
    quantization_cost,
    ranking_cost,
    scoring_cost,
)
from recipes.planning.layouts import USABLE_MEMORY_FRACTION
from recipes.planning.training_cost import (
    gathering_seconds,
    peak_memory,
    step_time,
    token_compute,
    validation_seconds,
)
from recipes.planning.transformer import LOGITS_BYTES, forward_flops, largest
from recipes.planning.workload import Layout, Workload
from recipes.pruning.settings import ScoreConfig
from recipes.stages.contract import smaller_settings, with_changes
from tests.unit.planning.models import CPU, H100, LLAMA, published

if TYPE_CHECKING:
    from recipes.planning.chain import Chain
    from tests.unit.conftest import MakePlan

TEXT = Sequences(number=40, seq_length=8192, micro_batch_size=4)
PASS_TOKENS = 4 * 8192
HEAD = 4 * 128256 * 4096
"""Bytes of Llama's head in float32."""
LARGE_VOCABULARY = Architecture(
    "LlamaForCausalLM", 4, 256, 1024, 4, 2, 64, 131072, 1024, tied_embeddings=False
)
"""Four layers. In float32, the logits of 4 sequences of 512 tokens would take 1.1 GB."""


def test_a_comparison_holds_one_model_and_the_heads_of_all() -> None:
    pruned = replace(LLAMA, num_layers=16)
    # Memory peaks while the first model runs, because it is the largest.
    cost = comparison_cost([LLAMA, pruned, pruned], True, TEXT, H100)
    assert cost.memory.weights == 2 * LLAMA.parameters() + HEAD
    assert cost.memory.activations == 2 * PASS_TOKENS * 3 * (14336 + 4096)
    # With equal models, memory peaks while the last one runs: the heads of both others remain.
    last = comparison_cost([LLAMA, LLAMA, LLAMA], True, TEXT, H100)
    assert last.memory.weights == 2 * LLAMA.parameters() + 3 * HEAD
    # If all models are small, memory peaks when logits are compared, with only heads in memory.
    small = comparison_cost([LARGE_VOCABULARY] * 3, True, TEXT, H100)
    assert small.memory.weights == 3 * 4 * 131072 * 256
    assert small.memory.logits == 4 * LOGITS_BYTES
    teacher_only = comparison_cost([LLAMA], False, TEXT, H100)
    assert teacher_only.memory.weights == 4 * LLAMA.parameters()
    attention = 2 * 8192 * 32 * 128 * 32
    tokens = 40 * 8192
    flops = tokens * (2 * LLAMA.active_weights() + attention)
    assert teacher_only.compute.flops == pytest.approx(flops)
    # A pruned candidate is a view of the teacher's weights. A healed candidate has its own weights,
    # and the teacher's head is also in memory. In float32, a model needs no copy of its head.
    for bf16, healed, heads in (
        (True, False, 2),
        (True, True, 2),
        (False, False, 0),
        (False, True, 1),
    ):
        ranking = ranking_cost(LLAMA, bf16, TEXT, H100, healed).memory
        assert ranking.weights == (2 if bf16 else 4) * LLAMA.parameters() + heads * HEAD
    assert conversion_cost(LLAMA, H100).memory.weights == 4 * LLAMA.parameters()
    quantization = quantization_cost(LLAMA, 256, H100).memory
    assert quantization.weights == 2 * (2 * LLAMA.parameters() + HEAD)
    # A CPU also holds the last hidden states of the text.
    cpu, gpu = (
        comparison_cost([LLAMA], False, TEXT, replace(CPU, kind=kind)) for kind in ("cpu", "gpu")
    )
    assert cpu.memory.activations - gpu.memory.activations == 4 * tokens * 4096


def test_scoring_keeps_the_input_of_every_layer() -> None:
    one_rank = scoring_cost(LLAMA, True, TEXT, H100)
    states = 2 * PASS_TOKENS * 4096
    # Per FFN channel: the activation in bfloat16, and two float32 copies by ModelOpt.
    layer = PASS_TOKENS * ((2 + 8) * 14336 + 2 * 2 * 4096)
    # The inputs of 32 layers, and the output of the last.
    assert one_rank.memory.activations == 33 * states + layer
    two_ranks = scoring_cost(LLAMA, True, TEXT, H100, pipeline=2)
    assert two_ranks.memory.activations == 17 * states + layer
    assert two_ranks.memory.weights == pytest.approx(LLAMA.parameters() + HEAD, rel=0.01)
    # The text has 40 sequences. 40 passes without a layer cost 0.6 of a forward pass each.
    with_ablations = scoring_cost(LLAMA, True, TEXT, H100, ablation_passes=40)
    assert with_ablations.compute.flops == pytest.approx(1.6 * one_rank.compute.flops)
    assert 3600 * with_ablations.hours(H100) == pytest.approx(
        with_ablations.compute.flops / (9.89e14 * 0.35)  # peak and utilisation of the profile
    )


def test_least_squares_reconstruction_holds_one_layer_at_a_time_on_a_gpu() -> None:
    student = replace(LLAMA, hidden_size=3072, ffn_hidden_size=9216)
    gpu, cpu = (healing_cost(LLAMA, student, TEXT, profile) for profile in (H100, CPU))
    parameters = LLAMA.parameters() + student.parameters()
    assert gpu.memory.weights == 4 * parameters / 32
    assert cpu.memory.weights == gpu.memory.weights + 2 * parameters
    tokens = 40 * 8192
    streams = tokens * (2 * (4096 + 3072) + 9216)
    assert gpu.memory.activations == 4 * (streams + PASS_TOKENS * 5 * 14336)
    # Four least-squares fits per layer. Two have the student's hidden size as inputs and the
    # teacher's as targets. Two have the heads' channels or the FFN width as inputs, and the
    # student's hidden size as targets.
    fits = 2 * 3072 * (3072 + 4096) + sum(n * (n + 3072) for n in (32 * 128, 9216))
    unscored = replace(TEXT, scored_fraction=0)  # without the FLOPs of the heads
    forward = sum(unscored.compute(arch, False).gemm_flops for arch in (LLAMA, student))
    assert gpu.compute.gemm_flops - forward == pytest.approx(tokens * 32 * 2 * fits)


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", "mistralai/Mistral-Nemo-Base-2407"])
def test_large_teachers_fit_into_a_gpu_with_default_micro_batches(model: str) -> None:
    """Sequences have 8,192 tokens."""
    teacher, available = published(model), 80e9 * USABLE_MEMORY_FRACTION
    text = replace(TEXT, micro_batch_size=EvaluateConfig().micro_batch_size)
    layout = Layout(micro_batch_size=CacheLogitsConfig().micro_batch_size)
    cache = Workload(None, teacher, layout, 8192, layout.micro_batch_size, 1)
    for memory in (
        comparison_cost([teacher] * 3, True, text, H100).memory,
        ranking_cost(teacher, True, text, H100, True).memory,
        scoring_cost(teacher, True, text, H100).memory,
        conversion_cost(teacher, H100).memory,
        peak_memory(cache, H100),
    ):
        assert memory.total < available


def test_estimated_memory_is_within_10_percent_of_measurements_on_a_cpu() -> None:
    """The peaks of the processes were measured on 8 sequences of 512 tokens, in batches of 4."""
    text, student = Sequences(8, 512, 4), replace(LARGE_VOCABULARY, num_layers=3)
    evaluated = comparison_cost([LARGE_VOCABULARY, student, student], False, text, CPU)
    assert evaluated.memory.total == pytest.approx(1.60e9, rel=0.10)
    scored = scoring_cost(LARGE_VOCABULARY, False, text, CPU)
    assert scored.memory.total == pytest.approx(1.40e9, rel=0.10)


def test_the_first_memory_saving_suggestions_change_a_stage_least() -> None:
    first, second, *_ = smaller_settings(EvaluateConfig())
    assert (first, second) == ({"micro_batch_size": 1}, {"precision": "bf16-mixed"})
    pipeline = {"pipeline_model_parallel_size": 2, "resources.devices": 2}
    (score := ScoreConfig()).name = "score_again"
    assert list(smaller_settings(score))[3] == pipeline
    changed = with_changes(score, pipeline)
    assert (changed.name, changed.resources.devices) == ("score_again", 2)


def cost_of(chain: Chain, stage: str, **changes: object) -> InferenceCost:
    """Returns the cost of a stage of a chain, with changed settings."""
    config = replace(chain.stages[stage], **changes)  # type: ignore[arg-type]
    cost = load_stage(config.stage).inference_cost
    assert cost is not None
    return cost(config, chain)


def test_cost_of_benchmarks_and_of_an_export(plan: MakePlan) -> None:
    """Each of three models evaluates the first 100 items of four benchmarks.

    Their items have 112, 60, 45 and 78 tokens. The head is computed for the 24% that are scored.
    """
    chain = plan("tasks=quick").chain
    student = chain.shape_of("prune")
    assert cost_of(chain, "export_hf").memory.weights == 4 * student.parameters()
    cost = chain.inference_costs["evaluate_tasks"]
    models = (chain.teacher, student, student)
    heads = sum(2 * arch.vocab_size * arch.hidden_size for arch in models)
    per_token = sum(forward_flops(arch, 512) for arch in models) - 0.76 * heads
    assert cost.compute.flops == pytest.approx(100 * (112 + 60 + 45 + 78) * per_token)
    size = 2 if cost.bf16 else 4
    head = 4 * chain.teacher.vocab_size * chain.teacher.hidden_size if cost.bf16 else 0
    assert cost.memory.weights == size * chain.teacher.parameters() + head
    all_items = cost_of(chain, "evaluate_tasks", limit=None, tasks=["sciq"])
    assert all_items.compute.flops == pytest.approx(1000 * 112 * per_token)
    student_steps = "stages.distill.student_steps=[20,40]"  # the students of two more steps
    with_steps = plan("tasks=quick", student_steps).chain.inference_costs["evaluate_tasks"]
    student_flops = (
        forward_flops(student, 512) - 0.76 * 2 * student.vocab_size * student.hidden_size
    )
    assert with_steps.compute.flops - cost.compute.flops == pytest.approx(
        2 * 100 * (112 + 60 + 45 + 78) * student_flops
    )
    shots = {"limit": 10, "tasks": ["mmlu", "piqa"], "num_fewshot": {"mmlu": 5, "piqa": 2}}
    fewshot = cost_of(chain, "evaluate_tasks", **shots)
    assert not fewshot.generated_bytes
    assert cost_of(
        chain, "evaluate_tasks", **shots, resources=Resources(devices=4)
    ).compute.flops == pytest.approx(fewshot.compute.flops / 4)
    mmlu = 57 * (10 + 5) * 95  # each subject's examples are computed once, and cached
    piqa = 10 * (1 + 2) * 60  # examples differ for each item
    assert fewshot.compute.flops == pytest.approx((mmlu + piqa) * per_token)


def test_generated_text_takes_memory_traffic(plan: MakePlan) -> None:
    """There are 165 batches of 8 prompts of 1,200 tokens. Each of a batch's 256 steps reads weights
    and KV cache; the mean step follows 128 new tokens. Of 8 ranks, the busiest has 21 batches."""
    chain = plan("tasks=quick").chain
    tasks = {"tasks": ["gsm8k_cot"], "limit": None}
    cost = cost_of(chain, "evaluate_tasks", **tasks)
    size = 2 if cost.bf16 else 4
    student = chain.shape_of("prune")
    context = 8 * (1200 + 128) * 2 * size * student.num_query_groups * student.kv_channels
    steps = 165 * 256
    models = (chain.teacher, student, student)
    traffic = sum(size * arch.parameters() + arch.num_layers * context for arch in models)
    assert cost.generated_bytes == pytest.approx(steps * traffic, rel=1e-6)
    without = replace(cost, generated_bytes=0)
    hardware = chain.hardware
    seconds = 3600 * (cost.hours(hardware) - without.hours(hardware))
    assert seconds == pytest.approx(steps * traffic / hardware.bytes_per_second)
    eight = cost_of(chain, "evaluate_tasks", **tasks, resources=Resources(devices=8))
    assert eight.generated_bytes == pytest.approx(cost.generated_bytes * 21 / 165)


def test_a_halving_trains_and_evaluates_its_candidates(plan: MakePlan) -> None:
    """Each of two rounds trains on half of the tokens: first four candidates, then two."""
    chain = plan(recipe="recipe=llama_search").chain
    cost = chain.inference_costs["successive_halving"]
    more = cost_of(chain, "successive_halving", num_samples=32)
    shape = chain.shapes["enumerate_shapes"][0]
    # 16 more samples; in two rounds the teacher runs twice, and candidates 4 + 2 times.
    passes = 256 * (2 * forward_flops(chain.teacher, 256) + 6 * forward_flops(shape, 256))
    assert more.compute.flops - cost.compute.flops == pytest.approx(16 * passes)
    workload = Workload(shape, chain.teacher, Layout(micro_batch_size=4), 256, 4, 1)
    training_flops = cost.compute.flops - 16 * passes
    assert training_flops == pytest.approx(200_000 * token_compute(workload).flops, rel=0.02)
    bf16 = chain.hardware.precision == "bf16-mixed"
    training = largest(
        *(
            peak_memory(replace(workload, trained=shape, terms=2, bf16=bf16), chain.hardware)
            for shape in chain.shapes["enumerate_shapes"]
        )
    )
    # The process of the search and that of the training each have reserved memory.
    assert cost.memory == replace(training, reserved=2 * training.reserved)


def test_ranks_and_devices_shorten_a_halving(plan: MakePlan) -> None:
    """Each of two rounds trains on 100,000 tokens, in steps of 1,024: four candidates, then two."""
    chain = plan("hardware=h100", recipe="recipe=llama_search").chain
    workload = Workload(
        chain.shapes["enumerate_shapes"][0], chain.teacher, Layout(micro_batch_size=4), 256, 4, 1
    )
    search: Any = chain.stages["successive_halving"]
    validated = replace(workload, terms=2, validation_batches=search.distill.limit_val_batches)
    step = step_time(replace(workload, terms=2), chain.hardware).total
    two = replace(search.distill, micro_batch_size=2, resources=Resources(devices=2))
    half_batches = replace(workload.layout, devices=2, micro_batch_size=2)
    shared = step_time(replace(workload, terms=2, layout=half_batches), chain.hardware).total
    # Each training ends with a checkpoint and a validation.
    pauses, shared_pauses = (
        gathering_seconds(each, chain.hardware) + validation_seconds(each, chain.hardware)
        for each in (validated, replace(validated, layout=half_batches))
    )
    assert shared_pauses > pauses > 0
    for changes, seconds in (
        ({}, (4 * 24 + 2 * 48) * step + 6 * pauses),
        ({"resources": Resources(devices=2)}, (2 * 24 + 48) * step + 3 * pauses),
        ({"resources": Resources(devices=3)}, (2 * 24 + 48) * step + 3 * pauses),
        ({"resources": Resources(devices=2, nodes=2)}, (24 + 48) * step + 2 * pauses),
        ({"distill": two}, (4 * 24 + 2 * 48) * shared + 6 * shared_pauses),
    ):
        cost = cost_of(chain, "successive_halving", **changes)
        evaluation = replace(cost, training_seconds=0.0).hours(chain.hardware)
        assert 0 < evaluation < seconds / 3600
        assert cost.hours(chain.hardware) - evaluation == pytest.approx(seconds / 3600)
