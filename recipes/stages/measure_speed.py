"""Measures the speed of the teacher's and the student's engine, and computes roofline bounds.

Reads both models and their engines. Writes ``BenchmarkResults`` to ``results.json``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from nemo_convert.architecture import Architecture
from recipes.core.files import write_json
from recipes.core.manifest import Outcome
from recipes.core.stage import Input, Inputs, metrics_log
from recipes.core.versions import OPENVINO_LIBRARIES
from recipes.engines.backends import (
    any_tensorrt_llm,
    built_engine,
    engine_devices,
    engine_of,
    model_folder,
    request_problems,
    require_backend,
)
from recipes.engines.bench import (
    ENGINE_ROLES,
    cpu_threads,
    measure,
    speedups,
    start_worker,
)
from recipes.engines.results import BASELINE, BenchmarkResults, MachineRates
from recipes.engines.settings import BuildEngineConfig, MeasureSpeedConfig
from recipes.engines.timing import RequestShape, TimedModel
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.inference_cost import InferenceCost, serving_cost
from recipes.planning.roofline import Roofline
from recipes.planning.rules import Problem
from recipes.planning.transformer import Compute, Memory, Storage, largest
from recipes.stages.contract import Stage

ENGINES = tuple(f"{role}_engine" for role in ENGINE_ROLES)
"""Names of the inputs that are engines: the teacher's, then the student's."""


def check(cfg: MeasureSpeedConfig, chain: Chain) -> Iterator[Problem]:
    """Yields problems of the largest batch of requests, and of engines that cannot be compared."""
    positions = chain.teacher.max_position_embeddings
    largest_batch = RequestShape(max(cfg.batch_sizes), max(cfg.prompt_tokens), cfg.new_tokens)
    length = largest_batch.prompt_tokens + largest_batch.new_tokens
    if length > positions:
        what = f"prompt_tokens + new_tokens is {length}, but the model has {positions} positions"
        yield Problem(rules.LENGTH, what, "lower prompt_tokens or new_tokens")
    engines = []
    for name in ENGINES:
        if engine := engine_of(cfg.inputs.get(name, ""), chain):
            engines.append(engine)
            other_fix = "lower batch_sizes, prompt_tokens or new_tokens"
            yield from request_problems(largest_batch, engine, cfg.inputs[name], other_fix)
    if len(engines) == len(ENGINES):
        yield from _pair_problems(*engines)


def _pair_problems(teacher: BuildEngineConfig, student: BuildEngineConfig) -> Iterator[Problem]:
    """Yields a problem for each setting that must be equal in both engines, but is not."""
    names = ["backend"]
    if teacher.precision == student.precision:  # else the KV caches may differ, too
        names.append("kv_cache_dtype")
    for name in names:
        teacher_value, student_value = getattr(teacher, name), getattr(student, name)
        if teacher_value != student_value:
            yield Problem(
                rules.ENGINE_PAIR,
                f"the teacher's engine has {name}={teacher_value}, the student's {student_value}",
                f"build both engines with the same {name}",
            )


def inference_cost(cfg: MeasureSpeedConfig, chain: Chain) -> InferenceCost:
    """Estimates the minimum cost of all requests to both engines, without the baselines' time.

    On GPUs, the memory is that of the larger engine; on a CPU, that of all engines and baselines.
    """
    batches = [(size, prompt) for prompt in cfg.prompt_tokens for size in cfg.batch_sizes]
    requests = (1 + cfg.repetitions) * batches  # repeats the list; the first copy is the warm-up
    costs, baseline_bytes = [], 0
    for role, name in zip(ENGINE_ROLES, ENGINES, strict=True):
        # If the engine's settings are not known, this assumes the defaults.
        engine = engine_of(cfg.inputs.get(name, ""), chain) or BuildEngineConfig()
        arch, devices = chain.shape_of(cfg.inputs.get(role)), engine.tensor_parallel_size
        costs.append(serving_cost(arch, requests, cfg.new_tokens, engine.storage, devices))
        if cfg.baseline:
            baseline_bytes += 4 * arch.parameters()  # float32
    memories = [cost.memory for cost in costs]
    all_models = Memory(
        weights=sum(memory.weights for memory in memories) + baseline_bytes,
        activations=sum(memory.activations for memory in memories),
    )
    return InferenceCost(
        memory=largest(*memories) if chain.hardware.on_gpu else all_models,
        compute=sum((cost.compute for cost in costs), Compute()),
        bf16=all(cost.bf16 for cost in costs),
        generated_bytes=sum(cost.generated_bytes for cost in costs),
    )


def needs_gpu(cfg: MeasureSpeedConfig, chain: Chain) -> bool:
    """Returns whether TensorRT-LLM builds one of the engines, in this or in another run."""
    return any_tensorrt_llm(ENGINES, cfg.inputs, chain)


def run(cfg: MeasureSpeedConfig, inputs: Inputs, out: Path) -> Outcome:
    """Measures both engines and, with ``baseline``, both transformers models; adds speed-ups."""
    from recipes.engines import machine_rates

    models = _timed_models(cfg, inputs, out.parent)
    for backend in {model.backend for model in models} - {BASELINE}:
        require_backend(backend)
    on_gpu = any(model.backend.startswith("tensorrt_llm") for model in models)
    threads = cfg.threads or cpu_threads()
    machine = machine_rates.measure(models[0].architecture, threads, "cuda" if on_gpu else "cpu")
    start_process = partial(start_worker, out.parent / "trtllm_bench", threads)
    shapes = [
        RequestShape(batch, prompt, cfg.new_tokens)
        for prompt in cfg.prompt_tokens
        for batch in cfg.batch_sizes
    ]
    rows = measure(models, shapes, cfg.repetitions, start_process, metrics_log(out))
    ratios = speedups(rows, models, lambda model: _roofline(machine, model))
    results = BenchmarkResults(machine, rows, ratios)
    write_json(out / "results.json", asdict(results))
    return Outcome(results)


def _timed_models(cfg: MeasureSpeedConfig, inputs: Inputs, scratch: Path) -> list[TimedModel]:
    """Returns the engines of teacher and student; with ``baseline``, also the float32 models.

    NeMo checkpoints are converted to Hugging Face folders in ``scratch``.
    """
    engines = []
    for role, name in zip(ENGINE_ROLES, ENGINES, strict=True):
        folder = model_folder(inputs[role], scratch / f"{role}_hf")
        engines.append(timed_engine(role, inputs[name], folder))
    baselines = [
        TimedModel(
            role=engine.role,
            backend=BASELINE,
            storage=Storage("fp32"),
            path=engine.folder,
            folder=engine.folder,
            architecture=engine.architecture,
        )
        for engine in engines
    ]
    return engines + baselines if cfg.baseline else engines


def timed_engine(role: str, engine: Input, folder: Path) -> TimedModel:
    """Returns an engine to measure, from the output of ``build_engine``.

    ``role`` is ``teacher`` or ``student``. ``folder`` has the engine's model for transformers.
    """
    settings = built_engine(engine.manifest)
    return TimedModel(
        role=role,
        backend=settings.backend,
        storage=settings.storage,
        path=engine.artifact,
        folder=folder,
        architecture=Architecture(**(engine.manifest.architecture or {})),
        tensor_parallel_size=settings.tensor_parallel_size,
    )


def _roofline(machine: MachineRates, model: TimedModel) -> Roofline:
    """Returns the machine's peak rates, which bound a model's speed."""
    rates = machine.flops_per_second  # by dtype; only ``fp32`` engines need float32
    peak_flops = rates["float32"] if model.storage.precision == "fp32" else max(rates.values())
    return Roofline(peak_flops, machine.bytes_per_second)


STAGE = Stage(
    config=MeasureSpeedConfig,
    kind="speed_results",
    run=run,
    check=check,
    inference_cost=inference_cost,
    single_rank_reason="the stage starts a process for each model",
    libraries=OPENVINO_LIBRARIES,
    inputs={
        "teacher": ("checkpoint_hf", "checkpoint_nemo"),
        "student": ("checkpoint_hf", "checkpoint_nemo"),
        "teacher_engine": ("engine",),
        "student_engine": ("engine",),
    },
    # The engines run in turn, so the larger one counts.
    devices=lambda config, chain: engine_devices(ENGINES, config.inputs, chain),
    needs_gpu=needs_gpu,
    needs_tensorrt_llm=needs_gpu,
)
