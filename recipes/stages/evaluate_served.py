"""Evaluates an engine or a GGUF file, and compares it with the student that it was built from.

Reads the built model (the engine or GGUF file), the student, and held-out text if configured.
Writes the answers of both models to all benchmark items. OpenVINO runs in this process; llama.cpp
and TensorRT-LLM run as servers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.core.versions import OPENVINO_LIBRARIES
from recipes.engines.backends import any_tensorrt_llm, engine_devices, engine_of
from recipes.engines.server import LLAMA_SERVER, NO_LLAMA_SERVER, has_llama_server
from recipes.engines.settings import EvaluateServedConfig
from recipes.evaluation.offline_tasks import TASKS
from recipes.evaluation.task_checks import task_problems, task_tokens
from recipes.planning import rules
from recipes.planning.chain import Chain, sequence_problems
from recipes.planning.inference_cost import InferenceCost, benchmark_cost
from recipes.planning.rules import Problem
from recipes.stages.contract import Stage

BUILDERS = ("build_engine", "export_gguf", "quantize")
"""Modules of the stages that convert a model to a format of another runtime."""
GENERATION_TASKS = ("gsm8k_cot",)
"""Tasks of ``offline_tasks`` in which the model generates text. The other tasks compare the
log-probabilities of given answers."""


def check(cfg: EvaluateServedConfig, chain: Chain) -> Iterator[Problem]:
    """Yields problems of tasks, of sequences, and of a missing or unsuitable server."""
    yield from task_problems(cfg, chain)
    yield from sequence_problems(cfg.seq_length, cfg.inputs, chain)
    if needs_tensorrt_llm(cfg, chain):
        # Tasks outside ``TASKS`` are not checked: they may be generation tasks.
        log_probability_tasks = TASKS.keys() - GENERATION_TASKS
        for name in sorted(log_probability_tasks & {*cfg.tasks}):
            yield Problem(
                rules.SERVED,
                f"task {name} needs log-probabilities of prompts, which trtllm-serve does not "
                "return",
                f"set stages.{cfg.name}.tasks=[{','.join(GENERATION_TASKS)}]",
            )
    elif cfg.limit is None:
        yield Problem(
            rules.SERVED_TIME,
            f"{cfg.name} answers all items on a CPU, in llama.cpp one token at a time: the stage "
            "takes longer than the plan says, for a large model many hours, and cannot resume",
            f"set stages.{cfg.name}.limit=100 to answer only the first 100 items of each task",
        )
    yield from _model_problems(cfg, chain)
    # The artifact is either an engine or a GGUF file.
    is_gguf = engine_of(cfg.inputs.get("artifact", ""), chain) is None
    if is_gguf and chain.runs_here and not has_llama_server():
        yield Problem(rules.SERVED, NO_LLAMA_SERVER.what, NO_LLAMA_SERVER.fix)


def _model_problems(cfg: EvaluateServedConfig, chain: Chain) -> Iterator[Problem]:
    """Checks that the engine or GGUF file was built from the student, the input ``checkpoint``."""
    source = cfg.inputs.get("artifact", "")
    # Follows the stages back from the artifact to the folder from which it was built.
    while (stage := chain.stages.get(source)) is not None and stage.stage in BUILDERS:
        source = stage.inputs["checkpoint"]
    is_in_this_run = stage is not None
    if is_in_this_run and source != cfg.inputs.get("checkpoint"):
        yield Problem(
            rules.SERVED,
            f"{cfg.name} compares {cfg.inputs['artifact']}, which is built from {source}, with "
            f"{cfg.inputs.get('checkpoint')}",
            f"set stages.{cfg.name}.inputs.checkpoint={source}",
        )


def needs_tensorrt_llm(cfg: EvaluateServedConfig, chain: Chain) -> bool:
    """Returns whether the built model is an engine of TensorRT-LLM."""
    return any_tensorrt_llm(["artifact"], cfg.inputs, chain)


def inference_cost(cfg: EvaluateServedConfig, chain: Chain) -> InferenceCost:
    """Estimates the cost of running both models on all items. Both have the student's shape."""
    student = chain.shape_of(cfg.inputs.get("checkpoint"))
    bf16, models = cfg.precision == "bf16-mixed", (student, student)
    tokens, generations = task_tokens(cfg)
    return benchmark_cost(models, bf16, tokens, cfg.pack_tokens, chain.hardware, generations)


def run(cfg: EvaluateServedConfig, inputs: Inputs, out: Path) -> Outcome:
    """Evaluates the built model, then the student, and compares them item by item."""
    from recipes.engines.served import evaluate

    return Outcome(evaluate(cfg, inputs, out, metrics_log(out)))


STAGE = Stage(
    config=EvaluateServedConfig,
    kind="served_results",
    run=run,
    check=check,
    inference_cost=inference_cost,
    single_rank_reason="the items are not split over ranks",
    libraries=(*OPENVINO_LIBRARIES, "xllamacpp"),
    programs=(LLAMA_SERVER,),
    inputs={"checkpoint": ("checkpoint_hf",), "artifact": ("engine", "gguf")},
    optional_inputs={"data": ("dataset",)},
    devices=lambda config, chain: engine_devices(["artifact"], config.inputs, chain),
    needs_tensorrt_llm=needs_tensorrt_llm,
)
