"""Fits a latency model for the search to the measured speed of a few architectures.

Reads the teacher's config and tokenizer. Builds and times engines for the corners of the search
space, and fits the latency model to their times. An engine for the middle of the space is timed to
show the latency model's error. The engines have random weights, which do not affect the time.
Writes ``latency.json``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from nemo_convert.hf_config import read_architecture, with_shape
from recipes.core.files import write_json
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.core.versions import OPENVINO_LIBRARIES
from recipes.engines.backends import engine_problems, request_problems, require_backend
from recipes.engines.bench import cpu_threads, measure, start_worker
from recipes.engines.settings import CALIBRATED_FORMATS, BuildEngineConfig
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.rules import Problem
from recipes.search.latency import build_random_engine, fit_latency, step_ms
from recipes.search.results import LatencyResult, TimedShape
from recipes.search.settings import EnumerateShapesConfig, MeasureLatencyConfig
from recipes.search.space import corner_shapes, latency_ms, middle_shape, name_of
from recipes.stages.contract import Stage

FILE = "latency.json"


def resolve_from_chain(cfg: MeasureLatencyConfig, chain: Chain) -> MeasureLatencyConfig:
    """Copies the space, and the serving settings with the device's rates, from the search."""
    for stage in chain.stages.values():
        if isinstance(stage, EnumerateShapesConfig):
            return replace(cfg, space=stage.space, service=stage.service.with_speed())
    return cfg


def check(cfg: MeasureLatencyConfig, chain: Chain) -> Iterator[Problem]:
    """Yields problems of the budget, of the engine's settings and of the timed requests."""
    cfg = resolve_from_chain(cfg, chain)
    searches = [s for s in chain.stages.values() if isinstance(s, EnumerateShapesConfig)]
    budgets = [search.budget.limits() for search in searches]
    # Only these two limits depend on the latency model.
    if any(limits.keys().isdisjoint({"latency_ms", "tokens_per_second"}) for limits in budgets):
        yield Problem(
            rules.BUDGET,
            "measure_latency would build and time engines, but the budget does not limit latency",
            "set budget.latency_ms or budget.tokens_per_second, or leave out "
            "latency_model=measured",
        )
    setting = "stages.measure_latency.engine"
    if cfg.engine.precision in CALIBRATED_FORMATS:
        yield Problem(
            rules.FORMAT,
            f"engines in {cfg.engine.precision} need calibrated weights, but measure_latency "
            "builds engines with random weights",
            f"set {setting}.precision=bf16, or use latency_model=roofline",
        )
    # Engines are timed with the settings of ``build_engine``. Without ``build_engine``, OpenVINO is
    # only a default, which does not fit a search for a GPU.
    has_engine = any(isinstance(stage, BuildEngineConfig) for stage in chain.stages.values())
    if chain.hardware.on_gpu and cfg.engine.backend == "openvino" and not has_engine:
        yield Problem(
            rules.FORMAT,
            f"OpenVINO engines run on the CPU, but the search is for {chain.hardware.name}",
            f"set {setting}.backend=tensorrt_llm {setting}.precision=bf16",
        )
    yield from engine_problems(cfg.engine, chain)
    request = cfg.request()
    if request.prompt_tokens < 1:
        yield Problem(
            rules.LENGTH,
            f"new_tokens={cfg.new_tokens} is too large for service.context_length="
            f"{cfg.service.context_length}: a prompt would have less than one token",
            "lower new_tokens, or raise service.context_length",
        )
    smaller_request_fix = "lower service.batch_size, service.context_length or new_tokens"
    yield from request_problems(request, cfg.engine, setting, smaller_request_fix)
    positions = chain.teacher.max_position_embeddings
    length = request.prompt_tokens + request.new_tokens
    if length > positions:
        what = f"timed requests have {length} tokens, more than the model's {positions} positions"
        yield Problem(rules.LENGTH, what, "lower service.context_length")


def disk_bytes(cfg: MeasureLatencyConfig, chain: Chain) -> int:
    """Returns the bytes of a model and an engine per shape, if all are as large as the teacher."""
    num_shapes = len(corner_shapes(chain.teacher, cfg.space)) + 1  # the corners and the middle
    model_bytes, engine_bytes = 2, 4  # per parameter: bfloat16, and at most float32
    return num_shapes * (model_bytes + engine_bytes) * chain.teacher.parameters()


def run(cfg: MeasureLatencyConfig, inputs: Inputs, out: Path) -> Outcome:
    """Builds and times the engines, and fits the latency model."""
    from nemo_convert import nemo

    log = metrics_log(out)
    checkpoint = nemo.find_checkpoint(inputs["checkpoint"].artifact)
    side_files, config = nemo.side_folder(checkpoint), nemo.read_config(checkpoint)
    teacher = read_architecture(config, str(side_files))
    corners, middle = corner_shapes(teacher, cfg.space), middle_shape(teacher, cfg.space)
    shapes = corners if middle in corners else [*corners, middle]  # the corners come first
    scratch = out.parent / "engines"
    shutil.rmtree(scratch, ignore_errors=True)  # a killed process may have left it
    models = []
    for num_built, shape in enumerate(shapes):
        log.progress("engine", num_built, len(shapes))
        shape_config = with_shape(config, shape)
        models.append(build_random_engine(cfg, side_files, shape_config, shape, scratch))
    threads = cfg.threads or cpu_threads()
    start_process = partial(start_worker, scratch / "trtllm_bench", threads)
    rows = measure(models, [cfg.request()], cfg.repetitions, start_process, log)
    step_times = [step_ms(row) for row in rows]  # a row for each shape, in the order of ``shapes``
    latency_model = fit_latency(corners, step_times[: len(corners)], cfg.service)
    service = replace(cfg.service, measured=latency_model)
    result = LatencyResult(
        measured=latency_model,
        threads=threads,
        backend=cfg.engine.backend,
        precision=cfg.engine.precision,
        shapes=[
            TimedShape(name_of(shape), milliseconds, latency_ms(shape, service), shape in corners)
            for shape, milliseconds in zip(shapes, step_times, strict=True)
        ],
    )
    write_json(out / FILE, asdict(result))
    return Outcome(result)


STAGE = Stage(
    config=MeasureLatencyConfig,
    kind="latency_model",
    run=run,
    check=check,
    single_rank_reason="the stage starts a process for each engine",
    libraries=OPENVINO_LIBRARIES,
    inputs={"checkpoint": ("checkpoint_nemo",)},
    devices=lambda config, chain: config.engine.tensor_parallel_size,
    needs_gpu=lambda config, chain: config.engine.backend != "openvino",
    needs_tensorrt_llm=lambda config, chain: config.engine.backend != "openvino",
    disk_bytes=disk_bytes,
    resolve_from_chain=resolve_from_chain,
    check_machine=lambda config: require_backend(config.engine.backend),
)
