"""What stages take that train nothing, by hand and as it was measured."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from nemo_convert.architecture import Architecture
from recipes.distillation.settings import CacheLogitsConfig
from recipes.evaluation.settings import EvaluateConfig
from recipes.planning.buffers import LOGITS_BYTES
from recipes.planning.estimate import flops_per_token, forward_flops, memory
from recipes.planning.hardware import Hardware
from recipes.planning.layouts import HEADROOM
from recipes.planning.reading import (
    Reading,
    Text,
    compared,
    converted,
    healed,
    ranked,
    scored,
    smaller,
)
from recipes.planning.workload import Layout, Workload
from recipes.pruning.settings import ScoreConfig
from tests.unit.planning.test_planner import CPU, H100, LLAMA, dense

if TYPE_CHECKING:
    from recipes.planning.chain import Chain
    from tests.unit.conftest import MakePlan

MISTRAL_TEXT = Text(windows=40, seq_length=8192, micro_batch_size=4)
TOKENS = 4 * 8192


def test_one_model_and_the_heads_of_all_by_hand() -> None:
    pruned = replace(LLAMA, num_layers=16)
    found = compared([LLAMA, pruned, pruned], True, MISTRAL_TEXT, H100)
    head = 4 * 128256 * 4096
    assert found.memory.weights == 2 * LLAMA.parameters() + head
    assert found.memory.activations == 2 * TOKENS * 3 * (14336 + 4096)
    # Where the students are as large, the last has two other heads beside it.
    last = compared([LLAMA, LLAMA, LLAMA], True, MISTRAL_TEXT, H100)
    assert last.memory.weights == 2 * LLAMA.parameters() + 3 * head
    # Where all are small, the peak is where what they said is compared: the heads are left.
    said = compared([LARGE_VOCABULARY] * 3, True, MISTRAL_TEXT, H100)
    assert said.memory.weights == 3 * 4 * 131072 * 256
    assert said.memory.logits == 4 * LOGITS_BYTES
    assert compared([LLAMA], False, MISTRAL_TEXT, H100).memory.weights == 4 * LLAMA.parameters()
    tokens = 40 * 8192
    attention = 2 * 8192 * 32 * 128 * 32
    assert compared([LLAMA], True, MISTRAL_TEXT, H100).work.flops == pytest.approx(
        tokens * (LLAMA.forward_flops_per_token() + attention)
    )


def test_importance_keeps_the_input_of_every_layer() -> None:
    whole = scored(LLAMA, True, MISTRAL_TEXT, H100)
    states = 2 * TOKENS * 4096
    layer = TOKENS * ((2 + 8) * 14336 + 2 * 2 * 4096)  # ModelOpt's two copies are in float32
    assert whole.memory.activations == 33 * states + layer
    half = scored(LLAMA, True, MISTRAL_TEXT, H100, pipeline=2)
    assert half.memory.activations == 17 * states + layer
    head = 4 * 128256 * 4096
    assert half.memory.weights == pytest.approx(LLAMA.parameters() + head, rel=0.01)
    again = scored(LLAMA, True, MISTRAL_TEXT, H100, left_out=40)
    assert again.work.flops == pytest.approx(1.6 * whole.work.flops)
    seconds = H100.compute_seconds(again.work, bf16=True)
    assert seconds == pytest.approx(again.work.flops / (9.89e14 * 0.35))


def test_a_conversion_is_proven_in_float32() -> None:
    assert converted(LLAMA, H100).memory.weights == 4 * LLAMA.parameters()


def test_shapes_are_ranked_in_the_weights_of_one_model() -> None:
    found = ranked(LLAMA, True, MISTRAL_TEXT, H100).memory
    heads = 2 * 4 * 128256 * 4096  # the teacher's and the candidate's
    assert found.weights == 2 * LLAMA.parameters() + heads


def test_a_shape_is_healed_with_a_layer_at_a_time_on_a_gpu() -> None:
    student = replace(LLAMA, hidden_size=3072, ffn_hidden_size=9216)
    on_gpu, here = (healed(LLAMA, student, MISTRAL_TEXT, profile) for profile in (H100, CPU))
    both = LLAMA.parameters() + student.parameters()
    assert on_gpu.memory.weights == 4 * both / 32
    assert here.memory.weights == on_gpu.memory.weights + 2 * both
    tokens, at_once = 8192 * MISTRAL_TEXT.windows, 8192 * MISTRAL_TEXT.micro_batch_size
    streams = tokens * (2 * (4096 + 3072) + 9216)
    assert on_gpu.memory.activations == 4 * (streams + at_once * 5 * 14336)
    # Behind both norms, of a student's width, and before both weights that write, of their inputs.
    normal = 2 * 3072 * (3072 + 4096) + sum(n * (n + 3072) for n in (32 * 128, 9216))
    forward = sum(
        replace(MISTRAL_TEXT, scored=0).work(arch, False).products for arch in (LLAMA, student)
    )
    assert on_gpu.work.products - forward == pytest.approx(
        MISTRAL_TEXT.windows * 8192 * 32 * 2 * normal
    )


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", "mistralai/Mistral-Nemo-Base-2407"])
def test_large_teachers_fit_a_gpu_by_default(model: str) -> None:
    """In windows of 8,192 tokens, at the stages' own micro batches."""
    teacher, room = dense(model), 80e9 * HEADROOM
    text = replace(MISTRAL_TEXT, micro_batch_size=EvaluateConfig().micro_batch_size)
    assert compared([teacher] * 3, True, text, H100).memory.total < room
    assert ranked(teacher, True, text, H100).memory.total < room
    assert scored(teacher, True, text, H100).memory.total < room
    assert converted(teacher, H100).memory.total < room
    layout = Layout(micro_batch_size=CacheLogitsConfig().micro_batch_size)
    cache = Workload("cache_logits", None, teacher, layout, 8192, layout.micro_batch_size, 1)
    assert memory(cache, H100).total < room


LARGE_VOCABULARY = Architecture(
    "LlamaForCausalLM", 4, 256, 1024, 4, 2, 64, 131072, 1024, tied_embeddings=False
)
"""Four layers in float32, of which whole logits of a micro batch would take 1.1 GB."""


def test_measured_on_a_cpu() -> None:
    """Peak memory of the stages' processes, on 8 windows of 512 tokens, 4 at a time."""
    text, student = Text(8, 512, 4), replace(LARGE_VOCABULARY, num_layers=3)
    evaluated = compared([LARGE_VOCABULARY, student, student], False, text, CPU)
    assert evaluated.memory.total == pytest.approx(1.60e9, rel=0.10)
    assert scored(LARGE_VOCABULARY, False, text, CPU).memory.total == pytest.approx(
        1.40e9, rel=0.10
    )


def test_what_takes_less_is_tried_in_the_order_of_what_it_changes() -> None:
    assert list(smaller(EvaluateConfig()))[:2] == [
        {"micro_batch_size": 1},
        {"precision": "bf16-mixed"},
    ]
    assert list(smaller(ScoreConfig()))[3] == {"pipeline_model_parallel_size": 2}


def test_a_cpu_holds_what_models_said_too() -> None:
    text = Text(40, 256, 4)
    gpu = replace(CPU, kind="gpu")
    assert isinstance(gpu, Hardware)
    more = compared([LLAMA], False, text, CPU).memory.activations
    assert more == compared([LLAMA], False, text, gpu).memory.activations + 4 * 40 * 256 * 4096


def readings(chain: Chain, **changes: dict[str, object]) -> dict[str, Reading]:
    """Of each stage of a chain that has one, perhaps with other settings."""
    return {
        name: estimates(replace(chain.stages[name], **changes.get(name, {})))
        for name, estimates in chain.readings.items()
    }


def test_benchmarks_and_the_export_are_planned(plan: MakePlan) -> None:
    """The first 100 items of four benchmarks, each read once by all three models."""
    chain = plan("tasks=quick").chain
    found, student = readings(chain), chain.workloads["distill"].trained
    assert student is not None
    assert found["export_hf"].memory.weights == 4 * student.parameters()
    asked = found["evaluate_tasks"]
    models = (chain.teacher, student, student)
    heads = sum(2 * arch.vocab_size * arch.hidden_size for arch in models)
    each = sum(forward_flops(arch, 512) for arch in models) - 0.76 * heads
    assert asked.work.flops == pytest.approx(100 * (112 + 60 + 45 + 78) * each)
    held = 2 if chain.hardware.inference_precision == "bf16-mixed" else 4
    head = 4 * chain.teacher.vocab_size * chain.teacher.hidden_size if held == 2 else 0
    assert asked.memory.weights == held * chain.teacher.parameters() + head
    every = readings(chain, evaluate_tasks={"limit": None, "tasks": ["sciq"]})["evaluate_tasks"]
    assert every.work.flops == pytest.approx(1000 * 112 * each)
    shots = {"limit": 10, "tasks": ["mmlu", "piqa"], "num_fewshot": {"mmlu": 5, "piqa": 2}}
    fewer = readings(chain, evaluate_tasks=shots)["evaluate_tasks"]
    subjects = 57 * (10 + 5) * 95  # whose examples are read once; piqa's are drawn for each item
    assert fewer.work.flops == pytest.approx((subjects + 10 * (1 + 2) * 60) * each)


def test_a_halving_trains_and_measures_its_candidates(plan: MakePlan) -> None:
    """Four candidates, then two, each round with half of the tokens, then measured."""
    chain = plan(recipe="recipe=llama_search").chain
    halving = readings(chain)["successive_halving"]
    more = readings(chain, successive_halving={"num_samples": 32})["successive_halving"]
    shapes = chain.stages["enumerate_shapes"].shapes(chain.teacher)  # type: ignore[attr-defined]
    read = 256 * (2 * forward_flops(chain.teacher, 256) + 6 * forward_flops(shapes[0], 256))
    assert more.work.flops - halving.work.flops == pytest.approx(16 * read)
    job = Workload("distill", shapes[0], chain.teacher, Layout(micro_batch_size=4), 256, 4, 1)
    trained = halving.work.flops - 16 * read
    assert trained == pytest.approx(200_000 * flops_per_token(job), rel=0.02)
    bf16 = chain.hardware.precision == "bf16-mixed"
    assert halving.memory == memory(replace(job, terms=2, bf16=bf16), chain.hardware)
