"""Tests rooflines, timings, the order of measurements, and the checks of ``measure_speed``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from launch.stages import with_shapes
from nemo_convert.architecture import Architecture
from recipes.core.manifest import write_manifest
from recipes.core.metrics import MetricsLog
from recipes.core.stage import Input
from recipes.distillation.settings import DistillConfig
from recipes.engines import bench
from recipes.engines.bench import measure, speedups
from recipes.engines.results import Spread
from recipes.engines.settings import BuildEngineConfig as EngineConfig
from recipes.engines.settings import MeasureSpeedConfig, QuantizeConfig
from recipes.engines.timing import RequestShape, TimedModel, Timing, Worker, spread
from recipes.planning.chain import Chain
from recipes.planning.hardware import Hardware
from recipes.planning.roofline import Roofline, decode_seconds, prefill_seconds
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
"""Its mean context is 100 + 11 / 2 = 105.5 tokens."""
FP32 = Storage("fp32")


@pytest.fixture
def untied(teacher: Architecture) -> Architecture:
    """The teacher with an untied head. The hand counts below use the sizes of both.

    These are 4 layers, hidden size 128, FFN width 256, vocabulary 512, and 8 heads of 16 channels
    in 4 groups.
    """
    return replace(teacher, tied_embeddings=False)


def test_weight_traffic_equals_a_hand_count(teacher: Architecture, untied: Architecture) -> None:
    assert weight_traffic(teacher, FP32, 1) == 4 * teacher.parameters()
    # A step reads only a few rows of an untied embedding, so its 512 * 128 weights do not count.
    assert weight_traffic(untied, FP32, 1) == 4 * (untied.parameters() - 512 * 128)
    layer_weights = teacher.parameters() - 512 * 128
    # 64 weights of 4 bits share 20 bits (a scale and a zero point): 4 + 20 / 64 = 4.3125 bits per
    # weight. A weight of the embedding has 8 bits.
    int4_bytes = layer_weights * 4.3125 / 8 + 512 * 128
    assert weight_traffic(teacher, Storage("int4", 64), 1) == int4_bytes
    # A token reads 2 of 8 experts. Two tokens read 8 * (1 - (6 / 8)^2) = 3.5 on average.
    moe = with_experts(teacher)
    # Bytes of a weight, layers, matrices, hidden size, width of an expert.
    expert_bytes = 4 * 4 * 3 * 128 * 128
    for tokens, experts_read in ((1, 2), (2, 3.5), (1000, 8)):
        traffic = weight_traffic(moe, FP32, tokens)
        assert traffic == pytest.approx(4 * moe.parameters() - (8 - experts_read) * expert_bytes)
    # With an empty KV cache, a decoding step of 2 sequences reads only weights.
    assert decode_traffic(moe, 2, 0, FP32) == weight_traffic(moe, FP32, 2)


def test_only_int4_engines_of_openvino_have_a_scale_per_group_of_weights() -> None:
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
def test_roofline_and_plan_assume_the_kv_cache_of_the_engine(
    settings: dict[str, Any], kv_bytes: int, teacher: Architecture, tmp_path: Path
) -> None:
    engine = EngineConfig("build_engine", **settings)
    manifest = bare_manifest("build_engine", "engine", None)
    manifest = replace(manifest, config=asdict(engine), architecture=teacher.as_dict())
    model = measure_speed.timed_engine("teacher", Input(tmp_path, manifest), tmp_path)
    service = Service(**{"backend": "openvino", "precision": "fp32"} | settings)
    assert model.storage == service.storage
    assert model.storage.kv_bytes == kv_bytes
    # A plan assumes the same KV cache. By default, the largest batch has 4 requests of 128 prompt
    # tokens and 32 new tokens.
    chain = Chain("teacher", teacher, {"teacher_engine": engine, "student_engine": engine})
    memory = measure_speed.inference_cost(config(), chain).memory
    cache_bytes = kv_cache_bytes(teacher, 4 * (128 + 32), model.storage)
    assert memory.activations == 2 * cache_bytes  # on a CPU, both engines are loaded at once
    without_baseline = measure_speed.inference_cost(config(baseline=False), chain).memory
    assert without_baseline.weights == 2 * stored_bytes(teacher, model.storage)
    # The baseline loads both models with weights of 4 bytes.
    assert memory.weights == without_baseline.weights + 2 * 4 * teacher.parameters()
    on_gpu = replace(chain, hardware=Hardware(kind="gpu"))
    assert measure_speed.inference_cost(config(), on_gpu).memory.activations == cache_bytes


def test_traffic_of_the_kv_cache_equals_a_hand_count(teacher: Architecture) -> None:
    # Tokens, layers, keys and values, query groups, channels per head, bytes per value.
    assert kv_cache_bytes(teacher, 10, Storage("fp32", kv_bytes=2)) == 10 * 4 * 2 * 4 * 16 * 2
    weight_bytes = weight_traffic(teacher, FP32, 1)
    cache_bytes = 3 * kv_cache_bytes(teacher, 10, FP32)  # 3 sequences after 10 tokens each
    assert decode_traffic(teacher, 3, 10, FP32) == weight_bytes + cache_bytes


def test_flops_of_prefill_and_decoding_equal_a_hand_count(teacher: Architecture) -> None:
    # Weights of a layer: Q, K, V and O (8 heads, 4 groups), and the three matrices of the FFN.
    layer_weights = 128 * 16 * (2 * 8 + 2 * 4) + 3 * 128 * 256
    linear = 2 * 4 * layer_weights  # 2 FLOPs per weight and token, 4 layers
    head = 2 * 512 * 128
    # Per token and context token: 4 layers; 2 GEMMs of 2 FLOPs, of which causal attention computes
    # half; 8 heads of 16 channels.
    attention = 4 * (2 * 2 // 2) * (8 * 16)
    assert prefill_flops(teacher, 1, 10) == 10 * (linear + attention * 10) + head
    # A new token attends to the whole context, so attention is not halved.
    assert decode_flops(teacher, 2, 10) == 2 * (linear + head + 2 * attention * 10)


def test_roofline_is_the_longer_of_compute_time_and_memory_time(teacher: Architecture) -> None:
    # The arguments are FLOP/s and bytes/s.
    slow_memory, slow_compute = Roofline(1e15, 1e9), Roofline(1e9, 1e15)
    assert decode_seconds(teacher, 2, 105.5, FP32, slow_memory) == pytest.approx(
        decode_traffic(teacher, 2, 105.5, FP32) / 1e9
    )
    assert prefill_seconds(teacher, 2, 100, FP32, slow_compute) == pytest.approx(
        prefill_flops(teacher, 2, 100) / 1e9
    )
    assert SHAPE.context == 105.5


def test_a_spread_has_the_median_and_the_ends_of_the_range() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0)


class ScriptedWorker(Worker):
    """Returns fixed timings; those of the first request of each batch size are ten times as long.

    Records its requests and its exit.
    """

    requests: ClassVar[list[tuple[str, int, list[list[int]]]]] = []
    """Role, batch size and prompts of the requests to all workers. An exit has batch size 0."""

    def __init__(self, model: TimedModel, seconds: float) -> None:
        self.role, self.seconds = model.role, seconds

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        is_warm_up = not any(r[:2] == (self.role, len(prompts)) for r in self.requests)
        self.requests.append((self.role, len(prompts), prompts))
        seconds = self.seconds * (10 if is_warm_up else 1)
        return Timing(seconds, 3 * seconds)

    def __exit__(self, *_: object) -> None:
        self.requests.append((self.role, 0, []))


@pytest.fixture
def pair(teacher: Architecture, tmp_path: Path) -> list[TimedModel]:
    """A teacher of 4 layers and a student of 2. Both have the same engine file of 5 bytes."""
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
    # 2 shapes, each with a warm-up and 2 repetitions: each model gets 6 requests.
    rows = measure(pair, shapes, 2, lambda m: ScriptedWorker(m, seconds[m.role]), MetricsLog(None))
    order = [role for role, batch_size, _ in ScriptedWorker.requests if batch_size]  # no exits
    assert order == ["teacher", "student"] * 6
    assert ScriptedWorker.requests[-2:] == [("student", 0, []), ("teacher", 0, [])]  # the exits
    teacher_batches = [
        str(prompts)
        for role, batch_size, prompts in ScriptedWorker.requests
        if role == "teacher" and batch_size
    ]
    assert len(set(teacher_batches)) == 6  # an engine would cache repeated prompts
    roles_and_batches = [(role, batch) for batch in (1, 2) for role in ("teacher", "student")]
    assert [(r.role, r.batch_size) for r in rows] == roles_and_batches
    assert rows[0].disk_bytes == 5  # the size of engine.bin
    assert rows[0].time_to_first_token_ms == Spread(400, 400, 400)  # 0.4 s, without the warm-up

    ScriptedWorker.requests.clear()
    with pytest.MonkeyPatch.context() as patch:  # trtllm-bench warms up itself
        patch.setattr(ScriptedWorker, "needs_warm_up", bench.TensorRtLlmWorker.needs_warm_up)
        measure(pair, shapes, 2, lambda m: ScriptedWorker(m, 1.0), MetricsLog(None))
    assert len([role for role, batch_size, _ in ScriptedWorker.requests if batch_size]) == 8

    results = speedups(rows, pair, lambda _: Roofline(1e15, 1e9))
    assert [r.batch_size for r in results] == [1, 2]
    assert results[0].prefill == pytest.approx(4)  # 0.4 s / 0.1 s
    assert results[0].decode == pytest.approx(4)
    teacher_bytes, student_bytes = (
        decode_traffic(model.architecture, 1, 9.5, FP32)  # the mean context is 8 + 3 / 2 tokens
        for model in pair
    )
    ratio = teacher_bytes / student_bytes
    assert results[0].decode_roofline == pytest.approx(ratio)
    assert 1 < ratio < 2  # the student has half of the layers, but the whole vocabulary

    # The rate of FP8 GEMMs is not measured, so there is no roofline for prefill.
    rows[1] = replace(rows[1], precision="fp8")
    results = speedups(rows, pair, lambda _: Roofline(1e15, 1e9))
    assert [r.prefill_roofline is None for r in results] == [True, False]


def config(**settings: Any) -> MeasureSpeedConfig:
    """Returns settings in which each input, such as ``teacher``, is from a stage of this name."""
    inputs = {name: name for name in measure_speed.STAGE.inputs}
    return MeasureSpeedConfig(stage="measure_speed", inputs=inputs, **settings)


@pytest.mark.parametrize(
    ("settings", "rules"),
    [
        ({}, []),
        # Exceeds the positions, max_input_len, max_seq_len and, in a batch of 4, max_num_tokens.
        ({"prompt_tokens": [1000]}, ["length"] + 3 * ["engine-limits"]),
        ({"batch_sizes": [1, 64], "prompt_tokens": [16]}, ["engine-limits"]),  # max_batch_size
        ({"prompt_tokens": [256]}, 2 * ["engine-limits"]),  # max_input_len and max_seq_len
        ({"batch_sizes": [1, 21]}, ["engine-limits"]),  # 21 * 128 is more than max_num_tokens
    ],
)
def test_requests_must_fit_the_model_and_its_engine(
    settings: dict[str, Any], rules: list[str], teacher: Architecture
) -> None:
    """The model has 1024 positions. By default, the largest batch has 4 requests of 128 prompt
    tokens and 32 new tokens.
    """
    engine = EngineConfig(
        stage="build_engine",
        backend="tensorrt_llm",
        max_batch_size=32,
        max_input_len=200,
        max_seq_len=280,
        max_num_tokens=2560,
    )
    # The teacher's engine never exceeds a limit, so all problems are of the student's engine.
    unlimited = replace(
        engine, max_batch_size=99, max_input_len=None, max_seq_len=None, max_num_tokens=99_999
    )
    chain = Chain("teacher", teacher, {"student_engine": engine, "teacher_engine": unlimited})
    assert [p.rule.name for p in measure_speed.check(config(**settings), chain)] == rules


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({}, []),
        ({"backend": "openvino"}, ["engine-pair"]),
        ({"kv_cache_dtype": "fp8"}, ["engine-pair"]),
        # The KV caches may differ if the weights differ, too: the student is quantized.
        ({"kv_cache_dtype": "fp8", "precision": "fp8"}, []),
    ],
)
def test_compared_engines_must_have_the_same_backend_and_kv_cache(
    changes: dict[str, Any], rules: list[str], teacher: Architecture, tmp_path: Path
) -> None:
    """The teacher's engine is first a stage of this run, then a stage directory of another run."""
    engine = EngineConfig("build_engine", backend="tensorrt_llm_pytorch", precision="bf16")
    student = replace(engine, **changes)  # the teacher's engine has no changes
    chain = Chain("teacher", teacher, {"student_engine": student, "teacher_engine": engine})
    assert [p.rule.name for p in measure_speed.check(config(), chain)] == rules
    manifest = replace(bare_manifest("build_engine", "engine", None), config=asdict(engine))
    write_manifest(tmp_path, manifest)
    cfg = config()
    cfg.inputs["teacher_engine"] = str(tmp_path)
    chain = Chain("teacher", teacher, {"student_engine": student})
    assert [p.rule.name for p in measure_speed.check(cfg, chain)] == rules


def test_quantize_checks_the_pruned_shape(teacher: Architecture) -> None:
    """The pruned width is checked even if several stages are between prune and quantize.

    ``int4_awq`` needs multiples of 128. The teacher's hidden size, 256, is one; 200 is not.
    """
    from recipes.stages import export_hf

    teacher = replace(teacher, hidden_size=256, kv_channels=64)
    stages = {
        "prune": PruneConfig(
            stage="prune", inputs={"checkpoint": "import_hf"}, target_hidden_size=200
        ),
        "distill": DistillConfig(stage="distill", inputs={"student": "prune"}),
        "export_hf": export_hf.ExportConfig(stage="export_hf", inputs={"checkpoint": "distill"}),
    }
    chain = with_shapes(Chain("teacher", teacher, stages), order=stages)
    cfg = QuantizeConfig(stage="quantize", format="int4_awq", inputs={"checkpoint": "export_hf"})
    assert [p.rule.name for p in quantize.check(cfg, chain)] == ["alignment"]
    unpruned = QuantizeConfig(
        stage="quantize", format="int4_awq", inputs={"checkpoint": "import_hf"}
    )
    assert list(quantize.check(unpruned, chain)) == []
