"""Tests float32 and compressed engines of tiny models, quantization, and measured GEMM rates."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nemo_convert.hf import TOKENIZER_FILES, Weights, copy_side_files, load_causal_lm
from nemo_convert.hf_config import read_architecture
from nemo_convert.smollm2 import HF_CONFIG
from recipes.core.errors import RecipeError
from recipes.core.files import storage_problem
from recipes.core.manifest import ARTIFACT, Outcome
from recipes.core.metrics import METRICS, MetricsLog, read_records
from recipes.data.split_writer import SplitWriter
from recipes.data.tokenizer import load_tokenizer
from recipes.engines import machine_rates, openvino
from recipes.engines.checks import compare_engine, greedy_margin
from recipes.engines.machine_rates import (
    MAX_TOTAL_SECONDS,
    MIN_REPEATS,
    TOKENS,
    best_seconds,
    training_rates,
)
from recipes.engines.openvino import Pipeline, read_properties
from recipes.engines.settings import BuildEngineConfig, QuantizeConfig
from recipes.search.space import Service, weight_bytes
from recipes.stages import build_engine, quantize
from tests.support.disks import small_disk
from tests.support.manifests import as_input, dataset_result
from tests.support.models import EVEN, ODD, write_tiny_model
from tests.support.runs import make_artifact_folder

Build = Callable[..., tuple[Path, Outcome]]
"""Builds an engine of a Hugging Face folder; returns the engine's folder and ``run``'s outcome."""


@pytest.fixture(scope="module")
def data(odd_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out and calibration text in the format of ``prepare_data``.

    Documents alternate between the two splits. They are short, so a sequence of 64 tokens usually
    contains the end of a document.
    """
    artifact = tmp_path_factory.mktemp("data")
    tokenizer = load_tokenizer(odd_llama)
    texts = [json.loads(line)["text"][:120] for line in text_file.read_text().splitlines()[:40]]
    with SplitWriter(artifact, ("heldout", "calibration")) as splits:
        for number, document in enumerate(tokenizer.encode(texts)):
            splits.add(("heldout", "calibration")[number % 2], document.ids)
    return artifact


@pytest.fixture
def build(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Returns a function that runs ``build_engine`` and asserts that no temporary files remain."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def build_and_check(folder: Path, **settings: Any) -> tuple[Path, Outcome]:
        stage = tmp_path / f"stage{len(list(tmp_path.iterdir()))}"  # a new name in each call
        out = make_artifact_folder(tmp_path, stage.name)
        inputs = {
            "checkpoint": as_input(stage / "checkpoint", "checkpoint_hf", artifact=folder),
            "data": as_input(stage / "data", "dataset", dataset_result(data), data),
        }
        cfg = BuildEngineConfig(stage="build_engine", seq_length=64, num_sequences=4, **settings)
        outcome = build_engine.run(cfg, inputs, out)
        remaining = [path.name for parent in (temporary, out.parent) for path in parent.iterdir()]
        assert remaining == [ARTIFACT]
        records = (r for r in read_records(stage / METRICS) if r["task"] == "engine")
        assert [record["done"] for record in records] == [0, 1, 2, 3]  # completed build steps
        return out, outcome

    return build_and_check


SEVEN_GROUPS = {
    **EVEN,
    "hidden_size": 56,
    "intermediate_size": 108,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 7,
    "num_key_value_heads": 7,
    "vocab_size": 301,
}
"""A shape with 7 heads in 7 groups and an untied head; no size is a multiple of 32."""
ODD_QWEN3 = {
    **ODD,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 14,
    "num_key_value_heads": 7,
    "head_dim": 12,
    "dtype": torch.bfloat16,
}
"""A shape with tied embeddings, and 14 heads in 7 groups, for a model with norms of queries and
keys. The head size is not ``hidden_size`` divided by the number of heads."""


@pytest.mark.parametrize(
    ("family", "shape"), [("llama", ODD), ("llama", SEVEN_GROUPS), ("qwen3", ODD_QWEN3)]
)
def test_float32_engines_generate_the_tokens_of_their_own_model_only(
    family: str, shape: dict[str, Any], build: Build, text_file: Path, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "model", text_file, family, **shape, train=False)
    engine, outcome = build(folder)
    result = outcome.result
    assert result.max_logit_difference < 1e-4
    assert result.greedy_margin < 1e-4
    # Also a bfloat16 checkpoint (``ODD_QWEN3``) gives a float32 engine, so that the engines of a
    # teacher and a student have equal types.
    assert not {"bf16", "f16"} & result.weight_types.keys()
    assert result.quality.engine.kl_to_teacher < 1e-6
    assert read_properties(engine)["INFERENCE_PRECISION_HINT"] == "f32"
    source = load_causal_lm(folder)
    # These ids are in the vocabularies of all three models.
    prompts = torch.randint(3, 290, (3, 20), generator=torch.Generator().manual_seed(0))
    generation = Pipeline(engine).generate(prompts, 24)
    generated = torch.tensor(generation.tokens)
    assert generated.shape == (3, 24)
    # Logits are compared instead of tokens. If two tokens are almost equally likely, rounding
    # decides which one is generated.
    assert greedy_margin(source, prompts, generated) < 1e-4
    assert 0 < generation.timing.first_seconds < generation.timing.total_seconds
    for pattern in TOKENIZER_FILES:
        for file in folder.glob(pattern):
            assert (engine / file.name).exists()
    source.model.layers[1].mlp.down_proj.weight.data *= 1.5
    other = tmp_path / "other"
    source.save_pretrained(other)
    copy_side_files(folder, other)
    cfg = BuildEngineConfig(stage="build_engine")
    with pytest.raises(RecipeError, match="engine check failed"):
        compare_engine(cfg, other, engine, None, MetricsLog(None))


def test_compressed_engines_report_their_quality(build: Build, odd_llama: Path) -> None:
    """Attention's output layer has 70 inputs (7 heads of 10), not a multiple of the group size 8.

    So it keeps 8 bits in the int4 engine. The numbers of inputs of other layers are multiples of 8.
    """
    engines = {p: build(odd_llama, precision=p, group_size=8) for p in ("int8", "int4")}
    results = {precision: outcome.result for precision, (_, outcome) in engines.items()}
    shape = read_architecture(json.loads((odd_llama / "config.json").read_text()), "odd")
    for precision, (engine, _) in engines.items():
        # The estimate is not exact: it counts norms as compressed, and omits the scales of rows.
        estimate = weight_bytes(
            shape, Service(backend="openvino", precision=precision, group_size=8)
        )
        size = (engine / "openvino_model.bin").stat().st_size
        assert size == pytest.approx(estimate, rel=0.1)
    for precision, result in results.items():
        quality = result.quality
        for metrics in (quality.engine, quality.source):
            assert all(math.isfinite(value) for value in astuple(metrics))
        assert quality.source.kl_to_teacher == 0  # here, the teacher is the source model itself
        assert quality.engine.kl_to_teacher > 0
        assert quality.sequences == 4
        # The first token of a sequence is not predicted, nor is a token after a document's end.
        assert 0 < quality.predictions < quality.tokens - quality.sequences
        assert result.precision == precision
    kl = {p: result.quality.engine.kl_to_teacher for p, result in results.items()}
    assert kl["int8"] < kl["int4"]
    assert kl["int8"] < 0.02
    layers, width, ffn = 5, 56, 120  # of ``odd_llama``; the feed-forward layers are compressed
    assert results["int8"].weight_types["u8"] >= layers * 3 * width * ffn
    assert results["int4"].weight_types["u4"] >= layers * 3 * width * ffn


def test_the_name_of_a_chat_template_cannot_write_outside_the_engine(
    odd_llama: Path, tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "run" / "engine"
    shutil.copytree(odd_llama, model, ignore=shutil.ignore_patterns("*.safetensors", "*.jinja"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    # transformers would save a template as a file of this name.
    templates = [{"name": name, "template": "x"} for name in ("default", "../../outside")]
    settings["chat_template"] = templates
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    out.mkdir(parents=True)
    openvino._write_tokenizer(model, out)
    assert (out / "openvino_tokenizer.xml").exists()
    assert list(tmp_path.rglob("outside*")) == []


@pytest.mark.parametrize("megabytes", [1, 2])
def test_a_full_disk_is_reported_and_temporary_files_are_deleted(
    megabytes: int, aligned: Path, tmp_path: Path
) -> None:
    """The smaller disk is full during the export, the larger disk while the engine is saved."""
    with small_disk(tmp_path / "disk", f"{megabytes}m") as disk:
        out = make_artifact_folder(disk.folder, "build_engine")
        with pytest.raises(OSError, match="No space left on device") as caught:
            openvino.build(BuildEngineConfig(stage="build_engine"), aligned, out)
        problem = storage_problem(caught.value, tmp_path)
        assert "free some space" in str(problem)


def test_ineffective_compression_is_refused(build: Build, text_file: Path, tmp_path: Path) -> None:
    """Layers keep 8 bits: no width is a multiple of 64, nor of 32, NNCF's smallest fallback."""
    folder = write_tiny_model(tmp_path / "model", text_file, **SEVEN_GROUPS, train=False)
    with pytest.raises(RecipeError, match="set a group_size"):
        build(folder, precision="int4", group_size=64)


def test_greedy_margin_is_zero_only_for_the_likeliest_tokens(odd_llama: Path) -> None:
    source = load_causal_lm(odd_llama)
    prompt = torch.tensor([[5, 6, 7]])
    best = source(prompt).logits[:, -1].argsort(descending=True)
    assert greedy_margin(source, prompt, best[:, :1]) == 0
    assert greedy_margin(source, prompt, best[:, 1:2]) > 0


@pytest.fixture(scope="module")
def aligned(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths are multiples of 128, the number of weights that share an AWQ scale."""
    shape = {**EVEN, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("aligned") / "aligned"
    return write_tiny_model(folder, text_file, **shape, train=False, dtype=torch.bfloat16)


@pytest.mark.parametrize(("name", "algorithm"), [("fp8", "FP8"), ("int4_awq", "W4A16_AWQ")])
def test_quantized_checkpoints(
    name: str, algorithm: str, aligned: Path, data: Path, tmp_path: Path
) -> None:
    """The files have ModelOpt's format. FP8 weights differ from the model's only by rounding."""
    out = make_artifact_folder(tmp_path, "quantize")
    inputs = {
        "checkpoint": as_input(tmp_path / "checkpoint", "checkpoint_hf", artifact=aligned),
        "calibration": as_input(tmp_path / "data", "dataset", dataset_result(data), data),
    }
    cfg = QuantizeConfig(
        stage="quantize",
        format=name,
        kv_cache_dtype="fp8" if name == "fp8" else "auto",
        seq_length=64,
        num_sequences=4,
        num_eval_sequences=2,
    )
    result = quantize.run(cfg, inputs, out).result
    assert result.quant_algo == algorithm
    assert 0 < result.quality.quantized.kl_to_teacher < 0.1
    assert math.isfinite(result.quality.quantized.perplexity)
    quantization = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert quantization["exclude_modules"] == ["lm_head"]
    assert quantization["kv_cache_quant_algo"] == ("FP8" if name == "fp8" else None)
    assert json.loads((out / "config.json").read_text())["quantization_config"]
    assert (out / "tokenizer.json").read_bytes() == (aligned / "tokenizer.json").read_bytes()
    layer = "model.layers.1.mlp.gate_proj"
    original = Weights(aligned).read(f"{layer}.weight").float()
    quantized = Weights(out)
    weight = quantized.read(f"{layer}.weight")
    scale = quantized.read(f"{layer}.weight_scale").float()
    if name == "fp8":
        assert weight.dtype == torch.float8_e4m3fn
        # FP8 has three bits of mantissa, so the relative error is at most 1/16. Near 0, the error
        # is less than the smallest positive FP8 number (1/512), in units of ``scale``.
        error = (weight.float() * scale - original).abs()
        assert (error <= original.abs() / 16 + scale / 512).all()
    if name == "int4_awq":
        # TensorRT-LLM's engine builder does not read ``pre_quant_scale``. So ``ENGINE_PRECISIONS``
        # excludes AWQ.
        suffixes = {name.split(".")[-1] for name in quantized.names() if "quant" in name}
        assert suffixes == {"pre_quant_scale"}
        assert weight.numel() * 2 == original.numel()  # two weights in a byte
        assert scale.numel() * 128 == original.numel()  # groups of 128 weights


SMOLLM2 = read_architecture(HF_CONFIG, "smollm2")
"""SmolLM2-135M, whose GEMMs ``training_rates`` measures."""


def test_measured_rates_are_plausible() -> None:
    """Lower limits are below the rates of a core without vector units, upper limits above any core.

    The rate in ``flops_per_second`` is in bfloat16, which some processors emulate.
    """
    threads_before = torch.get_num_threads()
    rates, _ = training_rates(1)
    assert 1e9 < rates.float32_flops_per_second < 1e12
    assert 1e8 < rates.flops_per_second < 1e13
    assert 5e8 < rates.bytes_per_second < 1e12
    assert torch.get_num_threads() == threads_before
    # Two threads have at most about twice the rate of one. A factor of 3 means that GEMMs are so
    # short that a helper thread's CPU time is not counted before they end. They seem twice as fast.
    two_cores, _ = training_rates(2)
    assert two_cores.float32_flops_per_second < 3 * rates.float32_flops_per_second
    assert two_cores.flops_per_second < 3 * rates.flops_per_second


@pytest.mark.parametrize("rate", [4e11, 4e8])
def test_a_rate_is_the_mean_over_all_gemms_of_a_model(
    rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake timer gives the layers ``rate`` and the head half of it.

    At the low rate the GEMMs of the smallest linear layer are slow, so no other is measured.
    """
    # FLOPs of three measurements per data type: smallest linear layer, transformer layers, head.
    measured_flops: list[int] = []

    def fake_seconds(operation: Callable[[], object], device: str = "cpu") -> float:
        if "copy" in operation.__qualname__:  # the measurement of memory bandwidth
            return 1.0
        with FlopCounterMode(display=False) as counter:
            operation()
        measured_flops.append(counter.get_total_flops())
        is_head = len(measured_flops) % 3 == 0
        return measured_flops[-1] / (rate / 2 if is_head else rate)

    monkeypatch.setattr(machine_rates, "best_cpu_seconds", fake_seconds)
    rates, _ = training_rates(1)
    if rate < 1e9:
        assert rates.flops_per_second == rates.float32_flops_per_second == rate
        assert len(measured_flops) == 2  # one per data type
        return
    # FLOPs per token of a forward pass.
    head = 2 * SMOLLM2.vocab_size * SMOLLM2.hidden_size
    layers = 2 * SMOLLM2.active_weights() - head
    # The head takes twice the time of layers with the same FLOPs.
    assert rates.flops_per_second == pytest.approx((layers + head) / (layers + 2 * head) * rate)
    # Whole transformer layers are measured. Each linear layer has four GEMMs: one in the forward
    # pass of each model, and two in the student's backward pass.
    assert measured_flops[1] % (4 * TOKENS * layers / SMOLLM2.num_layers) == 0


@pytest.mark.parametrize(
    ("seconds", "runs"),
    [(MAX_TOTAL_SECONDS / 100, 9), (MAX_TOTAL_SECONDS / 4, 4), (9.0, MIN_REPEATS)],
)
def test_slow_operations_are_repeated_fewer_times(seconds: float, runs: int) -> None:
    """With a fake clock. Runs stop after ``MAX_TOTAL_SECONDS``, but not before ``MIN_REPEATS``."""
    times = [0.0]  # readings of the clock: the start, then the end of each run

    def operation() -> None:
        times.append(times[-1] + seconds)

    assert best_seconds(operation, clock=lambda: times[-1], repeats=9) == pytest.approx(seconds)
    assert len(times) - 2 == runs  # ``times`` also has the start and the warm-up run
