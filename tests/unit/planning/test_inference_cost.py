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
    DecodingSteps,
    InferenceCost,
    Sequences,
    benchmark_cost,
    comparison_cost,
    conversion_cost,
    engine_build_cost,
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
from recipes.planning.transformer import LOGITS_BYTES, Storage, forward_flops, largest
from recipes.planning.workload import Layout, Workload
from recipes.pruning.settings import ScoreConfig
from recipes.stages.contract import smaller_settings, with_changes
from tests.unit.planning.models import CPU, H100, LLAMA, distillation, published

if TYPE_CHECKING:
    from recipes.planning.chain import Chain
    from tests.unit.conftest import MakePlan

BF16, FLOAT32 = True, False
"""Values of the parameter ``bf16``."""
TEXT = Sequences(number=40, seq_length=8192, micro_batch_size=4)
TEXT_TOKENS = 40 * 8192
PASS_TOKENS = 4 * 8192
"""Tokens of a forward pass over a micro batch of ``TEXT``."""
HEAD = 4 * 128256 * 4096
"""Bytes of Llama's head in float32."""
LARGE_VOCABULARY = Architecture(
    "LlamaForCausalLM",
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=1024,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=64,
    vocab_size=131072,
    max_position_embeddings=1024,
    tied_embeddings=False,
)
"""A small model whose memory is mainly for logits and heads.

In float32, the logits of 4 sequences of 512 tokens would take 1.1 GB.
"""


def test_a_comparison_holds_one_model_and_the_heads_of_all_models_so_far() -> None:
    pruned = replace(LLAMA, num_layers=16)
    # Memory peaks while the first model runs, because it is the largest.
    cost = comparison_cost([LLAMA, pruned, pruned], BF16, TEXT, H100)
    assert cost.memory.weights == 2 * LLAMA.parameters() + HEAD
    # Three tensors each of the feed-forward width and the hidden size, in bfloat16.
    assert cost.memory.activations == 2 * PASS_TOKENS * 3 * (14336 + 4096)
    # With equal models, memory peaks while the last one runs: the heads of the first two remain.
    equal_models = comparison_cost([LLAMA, LLAMA, LLAMA], BF16, TEXT, H100)
    assert equal_models.memory.weights == 2 * LLAMA.parameters() + 3 * HEAD
    # If all models are small, memory peaks when logits are compared, with only heads in memory.
    small = comparison_cost([LARGE_VOCABULARY] * 3, BF16, TEXT, H100)
    assert small.memory.weights == 3 * 4 * 131072 * 256  # three float32 heads
    assert small.memory.logits == 4 * LOGITS_BYTES  # four buffers


def test_cost_of_one_model_equals_a_hand_count() -> None:
    one_model = comparison_cost([LLAMA], FLOAT32, TEXT, H100)
    assert one_model.memory.weights == 4 * LLAMA.parameters()
    # Per token: 2 FLOPs per sequence position and channel of 32 heads of 128, in 32 layers.
    attention_flops = 2 * 8192 * 32 * 128 * 32
    flops = TEXT_TOKENS * (2 * LLAMA.active_weights() + attention_flops)
    assert one_model.compute.flops == pytest.approx(flops)
    # A CPU also holds the last hidden states of the text, here in float32.
    cpu, gpu = (
        comparison_cost([LLAMA], FLOAT32, TEXT, replace(CPU, kind=kind)) for kind in ("cpu", "gpu")
    )
    assert cpu.memory.activations - gpu.memory.activations == 4 * TEXT_TOKENS * 4096


def test_ranks_share_the_rates_of_a_cpu_but_not_of_a_gpu() -> None:
    cost = benchmark_cost(
        [LLAMA], FLOAT32, TEXT_TOKENS, 256, CPU, [DecodingSteps(10, batch_size=8, context=100)]
    )
    two_ranks = replace(cost, ranks_on_node=2)
    assert two_ranks.hours(CPU) == pytest.approx(2 * cost.hours(CPU))
    assert two_ranks.hours(H100) == cost.hours(H100)


def test_weights_in_memory_include_the_float32_heads_of_bfloat16_models() -> None:
    # A pruned candidate is a view of the teacher's weights. A healed candidate has its own weights,
    # and the teacher's head is also in memory. In float32, a model needs no copy of its head.
    for bf16, healed, heads in (
        (BF16, False, 2),
        (BF16, True, 2),
        (FLOAT32, False, 0),
        (FLOAT32, True, 1),
    ):
        ranking = ranking_cost(LLAMA, bf16, TEXT, H100, healed).memory
        assert ranking.weights == (2 if bf16 else 4) * LLAMA.parameters() + heads * HEAD
    assert conversion_cost(LLAMA, H100).memory.weights == 4 * LLAMA.parameters()
    # The original and the quantized model, each in bfloat16 with a float32 copy of its head.
    quantization = quantization_cost(LLAMA, 256, H100).memory
    assert quantization.weights == 2 * (2 * LLAMA.parameters() + HEAD)


def test_hours_of_a_conversion_and_of_an_engine_build_equal_hand_counts() -> None:
    """A conversion takes as long as four copies of 2 bytes per parameter at 500 MB/s.

    An FP8 engine of Qwen2.5-7B, which has 7.6 billion parameters, took 356 s.
    """
    parameters = LLAMA.parameters()
    conversion = conversion_cost(LLAMA, H100)
    assert conversion.hours(H100) == pytest.approx(4 * 2 * parameters / 5e8 / 3600)
    for devices in (1, 2):
        engine = engine_build_cost(LLAMA, Storage("bf16"), devices)
        assert engine.hours(H100) == pytest.approx(parameters / 7.6e9 * 356 / 3600, rel=0.01)
        assert engine.memory.weights == pytest.approx(2 * parameters / devices)


def test_scoring_keeps_the_input_of_every_layer() -> None:
    one_rank = scoring_cost(LLAMA, BF16, TEXT, H100)
    layer_input = 2 * PASS_TOKENS * 4096
    # Per feed-forward channel: the activation in bfloat16, and two float32 copies by ModelOpt.
    # Per hidden channel: the residual stream and the feed-forward layer's input, in bfloat16.
    hook = PASS_TOKENS * ((2 + 8) * 14336 + 2 * 2 * 4096)
    # The inputs of 32 layers, and the output of the last.
    assert one_rank.memory.activations == 33 * layer_input + hook
    two_ranks = scoring_cost(LLAMA, BF16, TEXT, H100, pipeline=2)
    assert two_ranks.memory.activations == 17 * layer_input + hook
    half_of_the_weights = 2 * LLAMA.parameters() / 2  # in bfloat16
    assert two_ranks.memory.weights == pytest.approx(half_of_the_weights + HEAD, rel=0.01)
    # An ablation pass, without one layer, costs 0.6 of a forward pass. Here, each of the text's
    # 40 sequences has one ablation pass in addition to its forward pass.
    with_ablations = scoring_cost(LLAMA, BF16, TEXT, H100, ablation_passes=40)
    assert with_ablations.compute.flops == pytest.approx(1.6 * one_rank.compute.flops)
    assert 3600 * with_ablations.hours(H100) == pytest.approx(
        with_ablations.compute.flops / (9.89e14 * 0.35)  # peak and utilisation of the profile
    )


def test_least_squares_reconstruction_holds_one_layer_at_a_time_on_a_gpu() -> None:
    student = replace(LLAMA, hidden_size=3072, ffn_hidden_size=9216)
    gpu, cpu = (healing_cost(LLAMA, student, TEXT, hardware) for hardware in (H100, CPU))
    parameters = LLAMA.parameters() + student.parameters()
    assert gpu.memory.weights == 4 * parameters / 32  # one of 32 layers, in float32
    # A CPU also holds both models in bfloat16.
    assert cpu.memory.weights == gpu.memory.weights + 2 * parameters
    # Float32 values of the whole text: both models' residual streams, raw and normalized, and the
    # inputs of the student's down projection. Of a micro batch: five feed-forward buffers.
    text_values = TEXT_TOKENS * (2 * (4096 + 3072) + 9216)
    # Float64 sums of the largest fit, of the down projection: 9216 inputs and 3072 outputs.
    sums = 8 * 9216 * (9216 + 3072)
    buffers = 4 * PASS_TOKENS * 5 * 14336
    # Solving needs four float64 matrices, and the right side and the results in both precisions.
    solving = 32 * 9216**2 + 20 * 9216 * 3072
    assert gpu.memory.activations == 4 * text_values + max(buffers + sums, solving)
    # Four least-squares fits per layer. A fit with n inputs and m targets takes 2·n·(n + m) FLOPs
    # per token. In two fits, n is the student's hidden size, and m is the teacher's. In the others,
    # n is the number of the heads' channels or the feed-forward width, and m is the student's
    # hidden size.
    input_fits = 2 * 3072 * (3072 + 4096)
    output_fits = sum(inputs * (inputs + 3072) for inputs in (32 * 128, 9216))
    fit_flops = TEXT_TOKENS * 32 * 2 * (input_fits + output_fits)
    without_logits = replace(TEXT, scored_fraction=0)  # without the FLOPs of the heads
    forward = sum(without_logits.compute(arch, FLOAT32).gemm_flops for arch in (LLAMA, student))
    assert gpu.compute.gemm_flops - forward == pytest.approx(fit_flops)


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", "mistralai/Mistral-Nemo-Base-2407"])
def test_large_teachers_fit_into_a_gpu_with_default_micro_batches(model: str) -> None:
    """Stages that run only forward passes fit into an H100 with sequences of 8,192 tokens."""
    teacher, available = published(model), 80e9 * USABLE_MEMORY_FRACTION
    text = replace(TEXT, micro_batch_size=EvaluateConfig().micro_batch_size)
    layout = Layout(micro_batch_size=CacheLogitsConfig().micro_batch_size)
    cache = Workload(None, teacher, layout, 8192, layout.micro_batch_size, 1)
    for memory in (
        comparison_cost([teacher] * 3, BF16, text, H100).memory,
        ranking_cost(teacher, BF16, text, H100, healed=True).memory,
        scoring_cost(teacher, BF16, text, H100).memory,
        conversion_cost(teacher, H100).memory,
        peak_memory(cache, H100),
    ):
        assert memory.total < available


def test_estimated_memory_is_within_10_percent_of_measurements_on_a_cpu() -> None:
    """The peak memory of the stages ``evaluate`` and ``score`` was measured.

    The text was 8 sequences of 512 tokens, in batches of 4.
    """
    text, student = Sequences(8, 512, 4), replace(LARGE_VOCABULARY, num_layers=3)
    evaluated = comparison_cost([LARGE_VOCABULARY, student, student], FLOAT32, text, CPU)
    assert evaluated.memory.total == pytest.approx(1.60e9, rel=0.10)
    scored = scoring_cost(LARGE_VOCABULARY, FLOAT32, text, CPU)
    assert scored.memory.total == pytest.approx(1.40e9, rel=0.10)


def test_suggestions_to_save_memory_start_with_the_least_intrusive() -> None:
    first, second, *_ = smaller_settings(EvaluateConfig())
    assert (first, second) == ({"micro_batch_size": 1}, {"precision": "bf16-mixed"})
    pipeline = {"pipeline_model_parallel_size": 2, "resources.devices": 2}
    score = ScoreConfig()
    score.name = "score_again"
    # The first three suggestions are a smaller micro batch, bfloat16, and both.
    assert list(smaller_settings(score))[3] == pipeline
    changed = with_changes(score, pipeline)  # keeps the name
    assert (changed.name, changed.resources.devices) == ("score_again", 2)


def cost_of(chain: Chain, stage: str, **changes: object) -> InferenceCost:
    """Returns the cost of a stage of a chain, with ``changes`` of the stage's settings."""
    config = replace(chain.stages[stage], **changes)  # type: ignore[arg-type]
    cost = load_stage(config.stage).inference_cost
    assert cost is not None
    return cost(config, chain)


def test_cost_of_benchmarks_equals_a_hand_count(plan: MakePlan) -> None:
    """Each of three models evaluates the first 100 items of four benchmarks.

    Their items have 112, 60, 45 and 78 tokens. Logits are computed for 24% of the tokens. Forward
    passes have 512 tokens.
    """
    chain = plan("tasks=quick").chain
    cost = chain.inference_costs["evaluate_tasks"]
    teacher, student = (
        forward_flops(arch, 512) - 0.76 * 2 * arch.vocab_size * arch.hidden_size
        for arch in (chain.teacher, chain.shape_of("prune"))
    )
    per_token = teacher + 2 * student  # the student is pruned, or distilled
    items = 100 * (112 + 60 + 45 + 78)
    assert cost.compute.flops == pytest.approx(items * per_token)
    value_bytes = 2 if cost.bf16 else 4
    head_copy = 4 * chain.teacher.vocab_size * chain.teacher.hidden_size if cost.bf16 else 0
    assert cost.memory.weights == value_bytes * chain.teacher.parameters() + head_copy
    all_items = cost_of(chain, "evaluate_tasks", limit=None, tasks=["sciq"])  # 1,000 items
    assert all_items.compute.flops == pytest.approx(1000 * 112 * per_token)
    student_steps = "stages.distill.student_steps=[20,40]"  # adds two students of earlier steps
    with_steps = plan("tasks=quick", student_steps).chain.inference_costs["evaluate_tasks"]
    assert with_steps.compute.flops - cost.compute.flops == pytest.approx(2 * items * student)
    settings = {"limit": 10, "tasks": ["mmlu", "piqa"], "num_fewshot": {"mmlu": 5, "piqa": 2}}
    fewshot = cost_of(chain, "evaluate_tasks", **settings)
    assert not fewshot.generated_bytes
    four_ranks = cost_of(chain, "evaluate_tasks", **settings, resources=Resources(devices=4))
    assert four_ranks.compute.flops == pytest.approx(fewshot.compute.flops / 4)
    # The limit of 10 items is for each of MMLU's 57 subjects. A subject's 5 examples are computed
    # once, and cached. In PIQA, each item has its own 2 examples. An example is as long as an item.
    mmlu = 57 * (10 + 5) * 95
    piqa = 10 * (1 + 2) * 60
    assert fewshot.compute.flops == pytest.approx((mmlu + piqa) * per_token)


def test_generated_text_takes_memory_traffic(plan: MakePlan) -> None:
    """GSM8K has 1,319 prompts of 1,200 tokens: 165 batches of 8.

    A batch takes 256 decoding steps. Each step reads the weights and the KV cache, whose mean
    length is the prompt and 128 new tokens. Of 8 ranks, the busiest has 21 batches.
    """
    chain = plan("tasks=quick").chain
    student = chain.shape_of("prune")
    assert cost_of(chain, "export_hf").memory.weights == 4 * student.parameters()  # in float32
    tasks = {"tasks": ["gsm8k_cot"], "limit": None}
    cost = cost_of(chain, "evaluate_tasks", **tasks)
    value_bytes = 2 if cost.bf16 else 4
    # Keys and values of a layer, for a batch. The recipe prunes neither query groups nor channels.
    cached_values = 8 * (1200 + 128) * 2 * student.num_query_groups * student.kv_channels
    steps = 165 * 256
    models = (chain.teacher, student, student)  # teacher, pruned and distilled model
    step_bytes = value_bytes * sum(
        arch.parameters() + arch.num_layers * cached_values for arch in models
    )
    assert cost.generated_bytes == pytest.approx(steps * step_bytes, rel=1e-6)
    without_generation = replace(cost, generated_bytes=0).hours(chain.hardware)
    seconds = 3600 * (cost.hours(chain.hardware) - without_generation)
    assert seconds == pytest.approx(steps * step_bytes / chain.hardware.bytes_per_second)
    eight_ranks = cost_of(chain, "evaluate_tasks", **tasks, resources=Resources(devices=8))
    assert eight_ranks.generated_bytes == pytest.approx(cost.generated_bytes * 21 / 165)


def search_workload(chain: Chain) -> Workload:
    """Returns one training step of a search's largest shape, with a single term of the loss."""
    size = {"seq_length": 256, "global_batch_size": 4, "steps": 1}
    largest_shape = chain.shapes["enumerate_shapes"][0]
    return distillation(largest_shape, chain.teacher, layout=Layout(micro_batch_size=4), **size)


def test_successive_halving_trains_and_evaluates_its_candidates(plan: MakePlan) -> None:
    """The first of two rounds has four candidates, the second has two.

    The search trains on 200,000 tokens in sequences of 256, in micro batches of 4. It evaluates on
    16 sequences.
    """
    chain = plan(recipe="recipe=llama_search").chain
    cost = chain.inference_costs["successive_halving"]
    more_samples = cost_of(chain, "successive_halving", num_samples=32)
    largest_shape = chain.shapes["enumerate_shapes"][0]
    # FLOPs to evaluate one sequence: in two rounds the teacher runs twice, candidates 4 + 2 times.
    passes = 256 * (2 * forward_flops(chain.teacher, 256) + 6 * forward_flops(largest_shape, 256))
    assert more_samples.compute.flops - cost.compute.flops == pytest.approx((32 - 16) * passes)
    workload = search_workload(chain)
    training_flops = cost.compute.flops - 16 * passes
    # Numbers of steps are rounded down, so up to 2% of the tokens are not used.
    assert training_flops == pytest.approx(200_000 * token_compute(workload).flops, rel=0.02)
    bf16 = chain.hardware.precision == "bf16-mixed"
    workload = replace(workload, terms=2, bf16=bf16)  # two terms of the loss: KD and LM loss
    shapes = chain.shapes["enumerate_shapes"]
    workloads = [replace(workload, trained=shape) for shape in shapes]
    training = largest(*(peak_memory(each, chain.hardware) for each in workloads))
    # The search and each training run are separate processes. Both have reserved memory.
    assert cost.memory == replace(training, reserved=2 * training.reserved)


def test_ranks_and_devices_shorten_successive_halving(plan: MakePlan) -> None:
    """Each of two rounds trains on 100,000 tokens, in steps of 4 · 256 tokens.

    In the first round, each of four candidates trains for 24 steps. In the second round, each of
    two candidates trains for 48 steps.
    """
    chain = plan("hardware=h100", recipe="recipe=llama_search").chain
    workload = replace(search_workload(chain), terms=2)  # KD and LM loss
    search: Any = chain.stages["successive_halving"]
    with_validation = replace(workload, validation_batches=search.distill.limit_val_batches)
    step = step_time(workload, chain.hardware).total
    # The same training run on two data-parallel devices.
    on_two_devices = replace(search.distill, micro_batch_size=2, resources=Resources(devices=2))
    two_devices = replace(workload.layout, devices=2, micro_batch_size=2)
    shared_step = step_time(replace(workload, layout=two_devices), chain.hardware).total
    # Each training run ends with a checkpoint and a validation.
    pauses, shared_pauses = (
        gathering_seconds(run, chain.hardware) + validation_seconds(run, chain.hardware)
        for run in (with_validation, replace(with_validation, layout=two_devices))
    )
    assert shared_pauses > pauses > 0
    # Ranks of the search train different candidates at the same time. The busiest of two or three
    # ranks trains two candidates and then one. With four ranks, it trains one in each round.
    for changes, seconds in (
        ({}, (4 * 24 + 2 * 48) * step + 6 * pauses),
        ({"resources": Resources(devices=2)}, (2 * 24 + 48) * step + 3 * pauses),
        ({"resources": Resources(devices=3)}, (2 * 24 + 48) * step + 3 * pauses),
        ({"resources": Resources(devices=2, nodes=2)}, (24 + 48) * step + 2 * pauses),
        ({"distill": on_two_devices}, (4 * 24 + 2 * 48) * shared_step + 6 * shared_pauses),
    ):
        cost = cost_of(chain, "successive_halving", **changes)
        evaluation = replace(cost, extra_seconds=0.0).hours(chain.hardware)
        assert 0 < evaluation < seconds / 3600
        assert cost.hours(chain.hardware) - evaluation == pytest.approx(seconds / 3600)
