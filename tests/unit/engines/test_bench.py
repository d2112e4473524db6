"""Tests rooflines, timings, the order of measurements, and the checks of ``measure_speed``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from launch.plan import with_shapes
from nemo_convert.architecture import Architecture
from nemo_convert.hf_config import read_architecture
from recipes.core.manifest import write_manifest
from recipes.core.metrics import MetricsLog
from recipes.core.stage import Input
from recipes.distillation.settings import DistillConfig
from recipes.engines.bench import measure, speedups
from recipes.engines.results import Spread
from recipes.engines.settings import BuildEngineConfig as EngineConfig
from recipes.engines.settings import MeasureSpeedConfig, QuantizeConfig
from recipes.engines.timing import RequestShape, TimedModel, Timing, Worker, spread
from recipes.planning.chain import Chain
from recipes.planning.hardware import Hardware
from recipes.planning.inference_cost import Roofline, decode_seconds, prefill_seconds
from recipes.planning.transformer import (
    Storage,
    decode_flops,
    decode_traffic,
    kv_cache_bytes,
    prefill_flops,
    stored_bytes,
    weight_traffic,
)
from recipes.pruning.settings import PruneConfig
from recipes.search.space import Service
from recipes.stages import measure_speed, quantize
from tests.support.manifests import bare_manifest
from tests.unit.planning.models import with_experts

SHAPE = RequestShape(batch_size=2, prompt_tokens=100, new_tokens=11)
FP32 = Storage("fp32")


@pytest.fixture
def untied(teacher: Architecture) -> Architecture:
    """The teacher with an untied head: 4 layers, hidden size 128, FFN width 256, vocabulary 512.

    It has 8 heads of 16 channels in 4 groups.
    """
    return replace(teacher, tied_embeddings=False)


def test_traffic_of_weights_equals_a_hand_count(
    teacher: Architecture, untied: Architecture
) -> None:
    assert weight_traffic(teacher, FP32, 1) == 4 * teacher.parameters()
    # A step reads only a few rows of an untied embedding, which are not counted.
    assert weight_traffic(untied, FP32, 1) == 4 * (untied.parameters() - 512 * 128)
    layers = teacher.parameters() - 512 * 128
    # 64 weights of 4 bits share 20 bits: a scale and a zero point. The embedding has 8 bits.
    assert weight_traffic(teacher, Storage("int4", 64), 1) == layers * 4.3125 / 8 + 512 * 128
    # A token reads 2 of 8 experts, which have 128 channels in each of 4 layers. Two tokens read
    # 3.5 on average.
    moe = with_experts(teacher)
    expert = 4 * 4 * 3 * 128 * 128
    for tokens, read in ((1, 2), (2, 3.5), (1000, 8)):
        traffic = weight_traffic(moe, FP32, tokens)
        assert traffic == pytest.approx(4 * moe.parameters() - (8 - read) * expert)
    assert decode_traffic(moe, 2, 0, FP32) == weight_traffic(moe, FP32, 2)


def test_only_engines_of_openvino_have_groups_of_int4_weights() -> None:
    engine = EngineConfig("build_engine", precision="int4", group_size=32)
    assert engine.scale_group == 32
    assert replace(engine, precision="int8").scale_group is None
    assert replace(engine, backend="tensorrt_llm").scale_group is None


@pytest.mark.parametrize(
    ("settings", "kv_bytes"),
    [
        ({}, 4),
        ({"precision": "int8"}, 1),  # OpenVINO's default
        ({"precision": "int8", "kv_cache_dtype": "f16"}, 2),
        ({"precision": "bf16", "backend": "tensorrt_llm"}, 2),
        ({"precision": "fp8", "backend": "tensorrt_llm", "kv_cache_dtype": "fp8"}, 1),
    ],
)
def test_rooflines_assume_the_kv_cache_of_the_engine(
    settings: dict[str, Any], kv_bytes: int, teacher: Architecture, tmp_path: Path
) -> None:
    engine = EngineConfig("build_engine", **settings)
    manifest = bare_manifest("build_engine", "engine", None)
    manifest = replace(manifest, config=asdict(engine), architecture=teacher.as_dict())
    model = measure_speed.timed_engine("teacher", Input(tmp_path, manifest), tmp_path)
    service = Service(**{"backend": "openvino", "precision": "fp32"} | settings)
    assert model.storage == service.storage
    assert model.storage.kv_bytes == kv_bytes
    # A plan counts the same bytes: all prompts and new tokens of the largest batch.
    chain = Chain("teacher", teacher, {"teacher_engine": engine, "student_engine": engine})
    memory = measure_speed.inference_cost(config(), chain).memory
    cache_bytes = kv_cache_bytes(teacher, 4 * (128 + 32), model.storage)
    assert memory.activations == 2 * cache_bytes  # both engines, at the same time
    engines = measure_speed.inference_cost(config(baseline=False), chain).memory
    assert engines.weights == 2 * stored_bytes(teacher, model.storage)
    assert memory.weights == engines.weights + 2 * 4 * teacher.parameters()
    on_gpu = replace(chain, hardware=Hardware(kind="gpu"))
    assert measure_speed.inference_cost(config(), on_gpu).memory.activations == cache_bytes


def test_traffic_of_the_kv_cache_equals_a_hand_count(teacher: Architecture) -> None:
    # tokens, layers, keys and values, groups, channels, bytes
    assert kv_cache_bytes(teacher, 10, Storage("fp32", kv_bytes=2)) == 10 * 4 * 2 * 4 * 16 * 2
    plain = weight_traffic(teacher, FP32, 1)
    assert decode_traffic(teacher, 3, 10, FP32) == plain + 3 * kv_cache_bytes(teacher, 10, FP32)


def test_flops_of_prefill_and_decoding_equal_a_hand_count(teacher: Architecture) -> None:
    per_layer = 128 * 16 * (2 * 8 + 2 * 4) + 3 * 128 * 256  # weights of attention and of the FFN
    head = 2 * 512 * 128
    attention = 4 * 2 * (8 * 16)  # 4 layers, 2 FLOPs for the causal half of two GEMMs, width
    assert prefill_flops(teacher, 1, 10) == 10 * (2 * 4 * per_layer + attention * 10) + head
    assert decode_flops(teacher, 2, 10) == 2 * (2 * 4 * per_layer + head + 2 * attention * 10)


def test_a_roofline_is_the_longer_of_two_times(teacher: Architecture) -> None:
    slow_memory, slow_compute = Roofline(1e15, 1e9), Roofline(1e9, 1e15)
    assert decode_seconds(teacher, 2, 105.5, FP32, slow_memory) == pytest.approx(
        decode_traffic(teacher, 2, 105.5, FP32) / 1e9
    )
    assert prefill_seconds(teacher, 2, 100, FP32, slow_compute) == pytest.approx(
        prefill_flops(teacher, 2, 100) / 1e9
    )
    assert SHAPE.context == 105.5


def test_rates_are_computed_from_seconds() -> None:
    timing = Timing(first_seconds=0.5, total_seconds=1.5)
    assert timing.decode_rate(SHAPE) == 2 * 10
    assert timing.throughput(SHAPE) == 2 * 111 / 1.5
    assert spread([3.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0)


class ScriptedWorker(Worker):
    """Returns fixed timings, ten times as long in a warm-up; records its requests and its exit."""

    requests: ClassVar[list[tuple[str, int, list[list[int]]]]] = []

    def __init__(self, model: TimedModel, seconds: float) -> None:
        self.name, self.seconds = model.role, seconds

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        is_warm_up = not any(r[:2] == (self.name, len(prompts)) for r in self.requests)
        self.requests.append((self.name, len(prompts), prompts))
        seconds = self.seconds * (10 if is_warm_up else 1)
        return Timing(seconds, 3 * seconds)

    def __exit__(self, *_: object) -> None:
        self.requests.append((self.name, 0, []))


@pytest.fixture
def pair(teacher: Architecture, tmp_path: Path) -> list[TimedModel]:
    student = replace(teacher, num_layers=2)
    (tmp_path / "engine.bin").write_bytes(b"12345")
    return [
        TimedModel(role, "openvino", FP32, tmp_path, tmp_path, arch)
        for role, arch in (("teacher", teacher), ("student", student))
    ]


def test_models_take_turns_and_the_warm_up_is_not_counted(pair: list[TimedModel]) -> None:
    ScriptedWorker.requests.clear()
    shapes = [RequestShape(1, 8, 3), RequestShape(2, 8, 3)]
    seconds = {"teacher": 0.4, "student": 0.1}
    # 2 shapes, each with a warm-up and 2 repetitions, so each model gets 6 requests
    rows = measure(pair, shapes, 2, lambda m: ScriptedWorker(m, seconds[m.role]), MetricsLog(None))
    order = [name for name, batch, _ in ScriptedWorker.requests if batch]
    assert order == ["teacher", "student"] * 6
    assert ScriptedWorker.requests[-2:] == [("student", 0, []), ("teacher", 0, [])]  # the exits
    prompts = [str(tokens) for name, _, tokens in ScriptedWorker.requests if name == "teacher"][:-1]
    assert len(set(prompts)) == 6  # an engine would answer a repeated prompt from a cache
    assert [(r.role, r.batch_size) for r in rows] == [
        ("teacher", 1),
        ("student", 1),
        ("teacher", 2),
        ("student", 2),
    ]
    assert rows[0].disk_bytes == 5
    assert rows[0].time_to_first_token_ms == Spread(400, 400, 400)

    results = speedups(rows, pair, lambda _: Roofline(1e15, 1e9))
    assert [r.batch_size for r in results] == [1, 2]
    assert results[0].prefill == pytest.approx(4)
    assert results[0].decode == pytest.approx(4)
    ratio = decode_traffic(pair[0].architecture, 1, 9.5, FP32) / decode_traffic(
        pair[1].architecture, 1, 9.5, FP32
    )
    assert results[0].decode_roofline == pytest.approx(ratio)
    assert 1 < ratio < 2  # half of the layers, but all of the vocabulary

    rows[1] = replace(rows[1], precision="fp8")  # the rate of its GEMMs is not measured
    results = speedups(rows, pair, lambda _: Roofline(1e15, 1e9))
    assert [r.prefill_roofline is None for r in results] == [True, False]


def config(**settings: Any) -> MeasureSpeedConfig:
    inputs = {name: name for name in measure_speed.STAGE.inputs}
    return MeasureSpeedConfig(stage="measure_speed", inputs=inputs, **settings)


@pytest.mark.parametrize(
    ("settings", "rules"),
    [
        ({}, []),
        ({"prompt_tokens": [1000]}, ["length"]),
        ({"batch_sizes": [1, 64], "prompt_tokens": [16]}, ["engine-limits"]),
        ({"prompt_tokens": [256]}, ["engine-limits", "engine-limits"]),
        # 21 prompts of 128 tokens are computed in two steps, as one step has at most 2560 tokens.
        ({"batch_sizes": [1, 21]}, ["engine-limits"]),
    ],
)
def test_requests_must_fit_the_model_and_its_engine(
    settings: dict[str, Any], rules: list[str], teacher: Architecture
) -> None:
    """The model has 1024 positions. The engine accepts 32 prompts of up to 200 tokens, or 280 with
    the new tokens, of which there are 32.
    """
    engine = EngineConfig(
        stage="build_engine",
        backend="tensorrt_llm",
        max_batch_size=32,
        max_input_len=200,
        max_seq_len=280,
        max_num_tokens=2560,
    )
    unlimited = replace(engine, max_batch_size=99, max_input_len=None, max_seq_len=None)
    unlimited.max_num_tokens = 99999
    chain = Chain("teacher", teacher, {"student_engine": engine, "teacher_engine": unlimited})
    broken = [p.rule.name for p in measure_speed.check(config(**settings), chain)]
    if settings.get("prompt_tokens") == [1000]:  # also breaks engine-limits
        broken = broken[:1]
    assert broken == rules


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({}, []),
        ({"backend": "openvino"}, ["engine-pair"]),
        ({"kv_cache_dtype": "fp8"}, ["engine-pair"]),
        ({"kv_cache_dtype": "fp8", "precision": "fp8"}, []),  # a quantized student
    ],
)
def test_engines_that_are_compared_are_of_one_kind(
    changes: dict[str, Any], rules: list[str], teacher: Architecture, tmp_path: Path
) -> None:
    """The teacher's engine is a stage of this run, or the directory of a stage of another run."""
    engine = EngineConfig("build_engine", backend="tensorrt_llm_pytorch", precision="bf16")
    student = replace(engine, **changes)
    chain = Chain("teacher", teacher, {"student_engine": student, "teacher_engine": engine})
    assert [p.rule.name for p in measure_speed.check(config(), chain)] == rules
    manifest = replace(bare_manifest("build_engine", "engine", None), config=asdict(engine))
    write_manifest(tmp_path, manifest)
    cfg = config()
    cfg.inputs["teacher_engine"] = str(tmp_path)
    chain = Chain("teacher", teacher, {"student_engine": student})
    assert [p.rule.name for p in measure_speed.check(cfg, chain)] == rules


def test_quantize_checks_the_pruned_shape() -> None:
    """The pruned width is checked even if several stages are between prune and quantize."""
    from recipes.stages import export_hf

    teacher = read_architecture(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "vocab_size": 512,
        },
        "teacher",
    )
    stages = {
        "prune": PruneConfig(
            stage="prune", inputs={"checkpoint": "import_hf"}, target_hidden_size=200
        ),
        "distill": DistillConfig(stage="distill", inputs={"student": "prune"}),
        "export_hf": export_hf.ExportConfig(stage="export_hf", inputs={"checkpoint": "distill"}),
    }
    chain = with_shapes(Chain("teacher", teacher, stages), stages)
    cfg = QuantizeConfig(stage="quantize", format="int4_awq", inputs={"checkpoint": "export_hf"})
    assert [p.rule.name for p in quantize.check(cfg, chain)] == ["alignment"]
    unpruned = QuantizeConfig(
        stage="quantize", format="int4_awq", inputs={"checkpoint": "import_hf"}
    )
    assert list(quantize.check(unpruned, chain)) == []
