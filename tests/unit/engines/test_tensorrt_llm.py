"""Tests the code that calls TensorRT-LLM, without TensorRT-LLM.

Every option, class and key that the code uses must be in ``tensorrt_llm_api.json``. This file lists
names that were copied from TensorRT-LLM's source.
"""

from __future__ import annotations

import ast
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from omegaconf import OmegaConf

from launch.executors import executor_of, slurm
from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT
from recipes.engines import bench, server, tensorrt_llm, trtllm_build_worker
from recipes.engines.timing import RequestShape, TimedModel, Timing, random_prompts
from recipes.planning.chain import Chain
from recipes.planning.transformer import Storage
from tests.support.launcher import write_program
from tests.unit.conftest import stage_named
from tests.unit.engines.configs import config, rules

if TYPE_CHECKING:
    from tests.unit.conftest import Compose, MakePlan

API: dict[str, Any] = json.loads(Path(__file__).with_name("tensorrt_llm_api.json").read_text())
SHAPE = RequestShape(batch_size=4, prompt_tokens=128, new_tokens=32)
REPORT: dict[str, Any] = {
    section: dict.fromkeys(API["report"][section], 1.0)
    for section in ("engine", "world_info", "request_info", "performance", "streaming_metrics")
}
"""A report with only the keys that TensorRT-LLM writes: reading any other key raises an error."""
# The values match ``SHAPE``. 4 requests of 128 + 32 tokens in 250 ms are 2560 tokens/s.
REPORT["request_info"] |= {"num_requests": 4, "avg_input_length": 128.0, "avg_output_length": 32.0}
REPORT["performance"] |= {"total_latency_ms": 250.0, "system_total_throughput_tok_s": 2560.0}
REPORT["streaming_metrics"]["avg_ttft_ms"] = 26.0


@pytest.mark.parametrize("backend", ["tensorrt_llm", "tensorrt_llm_pytorch"])
def test_every_option_of_the_benchmark_exists(backend: str, teacher: Architecture) -> None:
    engine, folder = Path("/engine"), Path("/hf/model")
    model = TimedModel("student", backend, Storage("bf16"), engine, folder, teacher, 2)
    argv = bench.trtllm_command(model, SHAPE, Path("/scratch"))
    assert argv[0] == "trtllm-bench"
    subcommand = argv.index("throughput")  # each side of it has its own options
    for arguments, command in (
        (argv[1:subcommand], "trtllm-bench"),
        (argv[subcommand + 1 :], "trtllm-bench throughput"),
    ):
        options, flags = API[command]["options"], API[command].get("flags", [])
        while arguments:
            assert arguments[0] in options
            # A flag has no value. Any other option is followed by one.
            arguments = arguments[1:] if arguments[0] in flags else arguments[2:]
    assert "throughput" in API["trtllm-bench"]["commands"]
    backend_option = argv[argv.index("--backend") + 1]
    assert backend_option in API["trtllm-bench throughput"]["backends"]
    assert (backend_option == "tensorrt") == ("--engine_dir" in argv)
    if backend_option == "tensorrt":
        assert not set(argv) & set(API["trtllm-bench throughput"]["refused_with_engine"])


@pytest.mark.parametrize("backend", ["tensorrt_llm", "tensorrt_llm_pytorch"])
def test_every_option_of_the_server_exists(backend: str) -> None:
    program, engine, *arguments = server.trtllm_command("/engine", backend, "/hf/model", 2)
    assert (program, engine) == ("trtllm-serve", "/engine")
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert options.keys() <= set(API["trtllm-serve"]["options"])
    backend_option = options.get("--backend", "pytorch")  # pytorch is the default
    assert backend_option in API["trtllm-serve"]["backends"]
    assert (backend_option == "tensorrt") == (backend == "tensorrt_llm")


@pytest.mark.parametrize("precision", tensorrt_llm.ENGINE_PRECISIONS)
def test_every_keyword_of_the_builder_exists(precision: str) -> None:
    cfg = config(precision=precision, kv_cache_dtype="fp8" if precision == "fp8" else "auto")
    request = tensorrt_llm.build_request(cfg, Path("/hf"), Path("/out"), 2048)
    builder = API["engine builder"]
    assert request["llm"].keys() <= set(builder["llm_keywords"])
    # The builder also passes these two keywords to the LLM class.
    assert {"build_config", "quant_config"} <= set(builder["llm_keywords"])
    assert request["build_config"].keys() <= set(API["BuildConfig"]["fields"])
    assert request["plugin_config"].keys() <= set(builder["plugin_config"])
    assert request["quant_config"].keys() <= set(builder["quant_config"])
    algorithms = {request["quant_config"].get("quant_algo")} - {None}
    assert algorithms <= set(API["QuantAlgo"]["members"])
    assert bool(algorithms) == (precision not in ("bf16", "fp16"))  # these are not quantized
    assert request["llm"]["dtype"] in ("bfloat16", "float16")  # never "auto": see DTYPES
    # By default, a sequence may fill the model's positions, and a prompt all but one of them.
    assert request["build_config"]["max_seq_len"] == 2048
    assert request["build_config"]["max_input_len"] == 2047


@pytest.mark.parametrize("kv_cache_dtype", tensorrt_llm.KV_CACHE_DTYPES)
def test_fp8_attention_is_built_only_with_an_fp8_kv_cache(kv_cache_dtype: str) -> None:
    cfg = config(precision="fp8", kv_cache_dtype=kv_cache_dtype)
    request = tensorrt_llm.build_request(cfg, Path("/hf"), Path("/out"), 2048)
    has_fp8_cache = "kv_cache_quant_algo" in request["quant_config"]
    has_fp8_attention = "use_fp8_context_fmha" in request["plugin_config"]
    assert has_fp8_attention == has_fp8_cache == (kv_cache_dtype == "fp8")


def test_every_import_and_call_of_the_builder_exists() -> None:
    tree = ast.parse(Path(trtllm_build_worker.__file__).read_text())
    imports = {
        node.module: [alias.name for alias in node.names]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tensorrt_llm")
    }
    assert imports == API["engine builder"]["imports"]
    llm_methods = {  # methods that the builder calls as ``llm.METHOD(...)``
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "llm"
    }
    assert llm_methods == set(API["engine builder"]["llm_methods"])


def test_options_of_the_pytorch_backend_exist() -> None:
    cfg = config(backend="tensorrt_llm_pytorch", kv_cache_dtype="fp8")
    options = json.loads(tensorrt_llm.llm_options(cfg, 1024))
    assert options.keys() <= set(API["llm options"]["options"])
    # ``kv_cache_config`` replaces all KV cache options of trtllm-bench, so it must have them all.
    set_by_benchmark = set(API["options of the benchmark itself"]["kv_cache_config"])
    existing = set_by_benchmark | set(API["llm options"]["kv_cache_config"])
    assert set_by_benchmark <= options["kv_cache_config"].keys() <= existing
    # With block reuse, the measured prompts would already be cached by the warm-up.
    assert options["kv_cache_config"]["enable_block_reuse"] is False
    assert options["max_seq_len"] == 1024


def test_times_of_a_benchmark_report_are_parsed() -> None:
    timing = bench.parse_trtllm_report(json.dumps(REPORT), SHAPE)
    assert timing == Timing(first_seconds=0.026, total_seconds=0.25)
    # 31 of the 32 new tokens of each request come after the first, in 0.25 - 0.026 s.
    assert timing.decode_rate(SHAPE) == pytest.approx(4 * 31 / 0.224)
    # Throughput has the same definition as in the report.
    assert timing.throughput(SHAPE) == REPORT["performance"]["system_total_throughput_tok_s"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"streaming_metrics": None}, "unknown format"),
        ({"request_info": {**REPORT["request_info"], "num_requests": 3}}, "measured .* not"),
        ({"request_info": {**REPORT["request_info"], "avg_output_length": 9.5}}, "measured .* not"),
    ],
)
def test_reports_of_unknown_format_or_other_requests_are_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        bench.parse_trtllm_report(json.dumps({**REPORT, **change}), SHAPE)
    with pytest.raises(RecipeError, match="unknown format"):
        bench.parse_trtllm_report("Traceback", SHAPE)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI")
def test_each_start_of_the_benchmark_is_an_mpi_job(
    tmp_path: Path, teacher: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake ``trtllm-bench`` records the id of its MPI job, and writes a report.

    If both starts were in one job, Open MPI 4 would refuse the second.
    """
    (tmp_path / "report").write_text(json.dumps(REPORT))
    record_job = f"echo $PMIX_NAMESPACE >>{tmp_path}/jobs"
    write_report = f"cp {tmp_path}/report {tmp_path}/student/{bench.REPORT}"
    write_program(tmp_path / "trtllm-bench", f"{record_job}\n{write_report}")
    write_program(tmp_path / "nvidia-smi", "")  # lists no GPU
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    cluster = OmegaConf.load(REPO_ROOT / "conf" / "cluster" / "slurm.yaml")
    monkeypatch.setenv(tensorrt_llm.LAUNCHER, cluster.mpi.measure_speed)
    model = TimedModel("student", "tensorrt_llm", Storage("bf16"), tmp_path, tmp_path, teacher)
    worker = bench.TensorRtLlmWorker(model, tmp_path)
    for seed in (0, 1):  # each request starts the benchmark
        worker.generate(random_prompts(SHAPE, 512, seed), SHAPE.new_tokens)
    assert len(set((tmp_path / "jobs").read_text().split())) == 2


def test_benchmark_dataset_has_the_configured_size_and_depends_on_the_seed() -> None:
    vocabulary = 512
    lines, lines_of_other_seed = (
        bench.trtllm_dataset(random_prompts(SHAPE, vocabulary, seed), 32).splitlines()
        for seed in (1, 2)
    )
    requests = [json.loads(line) for line in lines]
    assert [r["task_id"] for r in requests] == [0, 1, 2, 3]
    assert {len(r["input_ids"]) for r in requests} == {128}
    assert {r["output_tokens"] for r in requests} == {32}
    assert max(max(r["input_ids"]) for r in requests) < vocabulary
    assert lines_of_other_seed != lines


@pytest.mark.parametrize(("listing", "mebibytes"), [("1024\\n512", 1536), ("[N/A]", 0)])
def test_memory_of_visible_gpus_is_summed(
    listing: str, mebibytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake ``nvidia-smi`` prints the memory in MiB, one line per GPU.

    Its first answer is 100, which other programs use. Later answers are ``listing``.
    """
    answer = f"[ -e {tmp_path}/second ] && printf '{listing}\\n' || echo 100"
    commands = f"echo $@ > {tmp_path}/options\n{answer}\ntouch {tmp_path}/second"
    write_program(tmp_path / "nvidia-smi", commands)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(bench, "SAMPLE_SECONDS", 0.001)
    with bench.gpu_memory_samples() as samples:
        deadline = time.monotonic() + 60
        while len(samples) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert samples[1] == (mebibytes - 100) << 20  # samples[0] is always 0
    assert "--id=2,3" in (tmp_path / "options").read_text()


def test_missing_requirements_of_a_machine_are_named() -> None:
    problem = tensorrt_llm.machine_problem
    assert problem("tensorrt_llm", "1.2.0", gpu=True) is None
    assert problem("tensorrt_llm_pytorch", "1.3.0rc20", gpu=True) is None
    both_missing = str(problem("tensorrt_llm", None, gpu=False))
    assert "an NVIDIA GPU and TensorRT-LLM" in both_missing
    assert tensorrt_llm.IMAGE in both_missing
    # The first line is the problem, without the fix.
    assert "GPU" not in str(problem("tensorrt_llm", None, gpu=True)).splitlines()[0]
    # Release 1.3 cannot build engines, but has the PyTorch backend.
    assert "1.3.0rc20" in str(problem("tensorrt_llm", "1.3.0rc20", gpu=True))


def test_shapes_without_kernels_are_refused(teacher: Architecture) -> None:
    supported = replace(teacher, kv_channels=64, num_attention_heads=8, num_query_groups=4)
    chain = Chain("teacher", supported, {})
    assert rules(config(), chain) == []
    awq = config(backend="tensorrt_llm_pytorch", precision="int4_awq")
    assert rules(awq, chain) == []
    # No kernel has a head size of 10.
    odd_head = Chain("teacher", replace(supported, kv_channels=10), {})
    assert rules(config(), odd_head) == ["head-size"]
    assert rules(config(backend="tensorrt_llm_pytorch"), odd_head) == ["head-size"]
    # int8 needs multiples of 64. bfloat16 accepts any size.
    narrow = Chain("teacher", replace(supported, hidden_size=120), {})
    assert rules(config(), narrow) == []
    assert rules(config(precision="int8"), narrow) == ["alignment"]
    # Two ranks can divide neither the 7 heads nor the 7 query groups.
    seven_heads = replace(supported, num_attention_heads=7, num_query_groups=7)
    two_ranks = config(tensor_parallel_size=2)
    assert rules(two_ranks, Chain("teacher", seven_heads, {})) == 2 * ["tensor-parallel"]


@pytest.mark.parametrize(
    ("backend", "build_devices"), [("tensorrt_llm", 4), ("tensorrt_llm_pytorch", 1)]
)
def test_stages_that_run_an_engine_get_a_device_per_tensor_parallel_rank(
    compose: Compose, plan: MakePlan, backend: str, build_devices: int
) -> None:
    """TensorRT-LLM starts its ranks, so ``resources.devices`` is 1. PyTorch builds no engine."""
    overrides = (
        *("cluster=slurm", "cluster.images.tensorrt_llm=image", "skip_rules=[image,served]"),
        *("served=engine", f"stages.build_engine.backend={backend}"),
        "stages.build_engine.tensor_parallel_size=4",
    )
    recipe = "recipe=qwen3_8b_depth_2.5b"
    _, cluster = executor_of(compose(recipe, *overrides).cluster)
    planned = plan(*overrides, recipe=recipe)
    devices = {"build_engine": build_devices, "build_teacher_engine": build_devices}
    devices |= {"measure_speed": 4, "evaluate_served": 4, "prune": 1}
    for name, number in devices.items():
        stage = stage_named(planned, name)
        assert stage.devices == stage.request().devices == number
        assert stage.config.resources.devices == 1
        assert f"--gpus-per-node={number}\n" in slurm.job_script(stage, cluster)


def checkpoint_folder(folder: Path, algorithm: str | None) -> Path:
    """Makes a folder that declares the quantization ``algorithm``; ``None`` declares none."""
    folder.mkdir(exist_ok=True)
    if algorithm:
        text = json.dumps({"quantization": {"quant_algo": algorithm}})
        (folder / "hf_quant_config.json").write_text(text)
    return folder


def test_a_checkpoint_must_have_the_configured_quantization(tmp_path: Path) -> None:
    require = tensorrt_llm.require_quantization
    plain = checkpoint_folder(tmp_path / "plain", None)
    awq = checkpoint_folder(tmp_path / "awq", "W4A16_AWQ")
    require(plain, "bf16")
    require(plain, "int8")  # the engine builder quantizes to int8
    require(awq, "int4_awq")
    for folder, precision in ((plain, "fp8"), (awq, "fp8"), (awq, "bf16")):
        with pytest.raises(RecipeError, match="needs a checkpoint with quantization"):
            require(folder, precision)


def test_an_engine_that_differs_from_the_request_is_refused(tmp_path: Path) -> None:
    request = tensorrt_llm.build_request(
        config(precision="int8", max_batch_size=4), Path("/hf"), tmp_path, 1024
    )
    engine_config = {
        "pretrained_config": {"quantization": {"quant_algo": "W8A16"}, "mapping": {"tp_size": 1}},
        "build_config": {"max_batch_size": 4, "max_seq_len": 1024},
    }
    (tmp_path / "config.json").write_text(json.dumps(engine_config))
    with pytest.raises(RecipeError, match=r"rank\*.engine files: 0 instead of 1"):
        tensorrt_llm.require_engine(tmp_path, request)
    (tmp_path / "rank0.engine").write_bytes(b"engine")
    tensorrt_llm.require_engine(tmp_path, request)
    # As if the builder had ignored the quantization without an error.
    engine_config["pretrained_config"]["quantization"]["quant_algo"] = None
    (tmp_path / "config.json").write_text(json.dumps(engine_config))
    with pytest.raises(RecipeError, match="quant_algo=None instead of W8A16"):
        tensorrt_llm.require_engine(tmp_path, request)


def test_the_pytorch_backend_gets_the_checkpoint_and_its_options(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "hf", None)
    checkpoint_config = {"max_position_embeddings": 512, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(checkpoint_config))
    (folder / "model.safetensors").write_bytes(b"weights")
    out = tmp_path / "out"
    out.mkdir()
    cfg = config(backend="tensorrt_llm_pytorch")
    tensorrt_llm.prepare_pytorch(cfg, folder, out)
    assert (out / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((out / "llm_options.yaml").read_text())["max_seq_len"] == 512
    # The backend computes in the type of config.json, so the copy names bfloat16.
    engine_config = json.loads((out / "config.json").read_text())
    assert engine_config == {"max_position_embeddings": 512, "torch_dtype": "bfloat16"}
    assert json.loads((folder / "config.json").read_text()) == checkpoint_config
