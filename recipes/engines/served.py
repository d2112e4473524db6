"""Compares the answers of a served model, an engine or GGUF file, with those of the student.

llama.cpp and TensorRT-LLM run as servers, to which lm-eval's client for OpenAI-compatible
completions sends requests. OpenVINO GenAI has no server, so lm-eval's class for transformers runs
an OpenVINO engine in this process, through optimum-intel.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from transformers import AutoTokenizer, PreTrainedModel

from nemo_convert.generation_config import GENERATION_CONFIG
from nemo_convert.gguf_file import FILE
from nemo_convert.hf import load_causal_lm
from nemo_convert.results import GgufResult
from recipes.backend.device import device
from recipes.core.errors import RecipeError
from recipes.core.files import read_json
from recipes.core.metrics import MetricsLog
from recipes.core.precision import dtype_name
from recipes.core.stage import Input, Inputs
from recipes.engines import openvino, tensorrt_llm
from recipes.engines.backends import require_backend
from recipes.engines.bench import cpu_threads
from recipes.engines.results import EngineResult
from recipes.engines.served_lm import EngineLM, LlamaCppLM, ServedLM, generation_settings
from recipes.engines.server import HOST, free_port, llama_command, serving, trtllm_command
from recipes.engines.settings import EvaluateServedConfig
from recipes.evaluation import harness_tasks, packed_lm
from recipes.evaluation.results import Item, ServedResult, ServedText, compare_served
from recipes.evaluation.settings import HARNESS
from recipes.evaluation.task_answers import answer_tasks, require_same_items, write_samples

if TYPE_CHECKING:  # TensorRT-LLM's image does not have Megatron
    from recipes.data.token_sequences import TextSequences

GENERATION = "generate_until"
"""lm-eval's output type of tasks whose answers are generated."""
UNSERVED_SETTINGS = {
    *("num_beams", "penalty_alpha", "guidance_scale", "min_length", "min_new_tokens"),
    *("no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
    *("sequence_bias", "watermarking_config"),
    *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
}
"""Generation settings that change greedy decoding in transformers, but are not sent to servers."""


def server_of(artifact: Input) -> tuple[str, str]:
    """Returns the server or library that runs a built model, and the model's precision.

    The first value is a key of ``PROGRAMS`` in ``recipes.evaluation.results``.
    """
    if artifact.manifest.kind == "gguf":
        return "llama_cpp", artifact.manifest.result(GgufResult).type
    engine = artifact.manifest.result(EngineResult)
    return engine.backend, engine.precision


def evaluate(cfg: EvaluateServedConfig, inputs: Inputs, out: Path, log: MetricsLog) -> ServedResult:
    """Evaluates the served model, then the student that it was built from, on the same items.

    Writes both models' answers to each task to the folder ``samples`` in ``out``.
    """
    artifact, folder = inputs["artifact"], inputs["checkpoint"].artifact
    server, precision = server_of(artifact)
    # ``allow_unused``: the revisions are usually those of ``evaluate_tasks``, which has more tasks.
    tasks = harness_tasks.load_tasks(
        cfg.tasks, cfg.source, cfg.num_fewshot, cfg.revisions, cfg.name, allow_unused=True
    )
    if server.startswith("tensorrt_llm"):
        _require_generation(tasks)
    if server != "openvino":  # an OpenVINO engine contains the student's generation settings
        _require_served_settings(folder, tasks)
    length = _max_length(cfg, artifact, folder)
    fix = f"raise stages.{cfg.name}.max_length and the engine's limits, or remove the task"
    harness_tasks.require_room_for_text(tasks, length, fix)
    # Losses on text are measured here only in llama.cpp. ``build_engine`` has measured OpenVINO's.
    # In TensorRT-LLM they are unknown: trtllm-serve returns no log-probabilities of a prompt.
    text = _heldout_text(cfg, inputs) if server == "llama_cpp" else None
    losses: list[float] = []
    served: dict[str, list[Item]] = {}
    with served_lm(cfg, artifact, folder, length, cfg.seq_length if text else 0) as lm:
        for number, task in enumerate(tasks, 1):
            lm.progress = partial(log.progress, f"requests, {task.name}")
            served[task.name] = harness_tasks.answer(lm, task, cfg.limit, cfg.seed)
            log.progress("tasks, served", number, len(tasks))
        if text is not None:
            lm.progress = partial(log.progress, "text, served")
            losses = lm.losses(text)
    del lm
    gc.collect()  # frees an engine in this process before the student is loaded
    dtype = dtype_name(cfg.precision)
    # Unlike ``to(dtype)``, loading in a dtype leaves RoPE's frequencies in float32.
    student = load_causal_lm(folder, dtype).to(device())
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    progress = partial(log.progress, "requests, student")
    student_lm = packed_lm.PackedLM(student, tokenizer, cfg.pack_tokens, progress, length)
    # Part of the key of the student's cached answers: the model, its dtype and the maximum length.
    identity = f"{inputs['checkpoint'].manifest.content_hash()} {dtype} {length}"
    answers, _ = answer_tasks(cfg, "student", student_lm, lambda: identity, tasks, log)
    (out / "samples").mkdir()
    scores = {}
    for task in tasks:
        items = {"student": answers[task.name].items, "served": served[task.name]}
        require_same_items(task.name, items)
        write_samples(out / "samples" / f"{task.name}.jsonl", items)
        scores[task.name] = compare_served(task.metric, items)
    served_text = _text_of_build(artifact)
    if text is not None:
        served_text = _compare_text(student, text, losses, log)
    return ServedResult(
        server=server,
        precision=precision,
        tasks=scores,
        text=served_text,
        harness=f"lm_eval {HARNESS}, student in {dtype}",
        data=", ".join(dict.fromkeys(task.data for task in tasks)),  # without duplicates
    )


@contextmanager
def served_lm(
    cfg: EvaluateServedConfig, artifact: Input, folder: Path, length: int, text_length: int = 0
) -> Iterator[LM]:
    """Loads a built model in this process, or starts its server; yields it for lm-eval.

    ``folder`` is the student's Hugging Face folder, which has the tokenizer. ``length`` is the
    maximum number of tokens of a prompt together with its answer. ``text_length`` is the number of
    tokens of a sequence of held-out text; 0 if no losses on text are needed.
    """
    server, _ = server_of(artifact)
    if server == "openvino":
        # lm-eval's OptimumLM is not used: it starts torch.distributed if LOCAL_RANK is set.
        model = openvino.load_engine(artifact.artifact)
        packed_lm.leave_length_to_tasks(model.generation_config)
        yield EngineLM(
            pretrained=model,
            tokenizer=str(folder),
            batch_size=1,
            max_length=length,
            trust_remote_code=False,
        )
        return
    port = free_port()
    if server == "llama_cpp":
        threads = cfg.threads or cpu_threads()
        # llama.cpp refuses a prompt that fills its context, so the context has one more position.
        # A text's sequence fits, because its last token is never part of a prompt.
        context = max(length + 1, text_length)
        command = llama_command(artifact.artifact / FILE, port, context, threads)
        with serving(command, port, cfg.start_seconds) as address:
            yield LlamaCppLM(address, folder, length)
        return
    require_backend(server)
    ranks = artifact.manifest.config["tensor_parallel_size"]
    command = trtllm_command(str(artifact.artifact), server, str(folder), ranks)
    command += ["--host", HOST, "--port", str(port)]
    with serving(command, port, cfg.start_seconds, tensorrt_llm.launcher()) as address:
        yield ServedLM(address, folder, length)


def _max_length(cfg: EvaluateServedConfig, artifact: Input, folder: Path) -> int:
    """Returns the maximum tokens of a prompt together with its answer."""
    positions: int = read_json(folder / "config.json")["max_position_embeddings"]
    limits = [cfg.max_length, positions - 1]  # a server needs a free position at the end
    if server_of(artifact)[0].startswith("tensorrt_llm"):
        limits += engine_limits(artifact.manifest.config)
    return min(limits)


def engine_limits(build: Mapping[str, Any]) -> list[int]:
    """Returns an engine's limits on the tokens of a prompt together with its answer.

    ``build`` has the settings of ``build_engine``. Those that are ``None`` set no limit.
    """
    limits: list[int] = []
    if build["max_seq_len"]:
        limits.append(build["max_seq_len"] - 1)  # a server needs a free position at the end
    # Without chunked prefill, a prompt must fit into the tokens of a forward pass, too.
    limits += filter(None, (build["max_input_len"], build["max_num_tokens"]))
    return limits


def _require_served_settings(folder: Path, tasks: Sequence[harness_tasks.Task]) -> None:
    """Raises ``RecipeError`` if the student has generation settings that the server does not get.

    Such settings matter only if a task's answers are generated.
    """
    output_types = {subtask.OUTPUT_TYPE for task in tasks for subtask in task.subtasks.values()}
    settings = generation_settings(folder)
    if settings.get("guidance_scale") == 1:  # has no effect, like transformers' default of None
        del settings["guidance_scale"]
    if GENERATION in output_types and (names := UNSERVED_SETTINGS & settings.keys()):
        raise RecipeError(
            f"{folder / GENERATION_CONFIG} has {', '.join(sorted(names))}, which the server does "
            "not get: the student would generate text in another way",
            "remove the setting from the teacher, or the tasks whose answers are generated",
        )


def _require_generation(tasks: Sequence[harness_tasks.Task]) -> None:
    """Raises ``RecipeError`` if a task needs log-probabilities of prompts."""
    for task in tasks:
        if any(subtask.OUTPUT_TYPE != GENERATION for subtask in task.subtasks.values()):
            raise RecipeError(
                f"task {task.name} needs log-probabilities of prompts, which trtllm-serve does not "
                "return",
                "use tasks whose answers are generated, such as gsm8k_cot",
            )


def _heldout_text(cfg: EvaluateServedConfig, inputs: Inputs) -> TextSequences | None:
    """Returns held-out sequences; ``None`` if the stage has no input ``data``."""
    from recipes.data.token_sequences import read_sequences

    data = inputs.get("data")
    return read_sequences(data, "heldout", cfg.seq_length, cfg.num_sequences) if data else None


def _compare_text(
    student: PreTrainedModel, text: TextSequences, losses: list[float], log: MetricsLog
) -> ServedText:
    """Compares ``losses`` of the served model on ``text`` with the student's."""
    from recipes.evaluation.predictions import TEACHER, Predictor
    from recipes.evaluation.text_quality import score

    # ``score`` needs a model with the key TEACHER, although a loss does not depend on a teacher.
    scores = score({TEACHER: Predictor.of(student)}, text, log)
    return ServedText.of(losses, scores[TEACHER].losses, text.predictions)


def _text_of_build(artifact: Input) -> ServedText | None:
    """Returns the comparison on held-out text that ``build_engine`` made; ``None`` without one."""
    if artifact.manifest.kind != "engine":
        return None
    quality = artifact.manifest.result(EngineResult).quality
    return quality.served_text() if quality else None
