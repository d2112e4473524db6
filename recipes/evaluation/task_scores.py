"""Evaluates a run's models on benchmarks, one model at a time, and compares their scores."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from nemo_convert import nemo
from nemo_convert.generation_config import GENERATION_CONFIG
from recipes.core.metrics import MetricsLog
from recipes.core.precision import dtype_name, dtype_of
from recipes.core.stage import Inputs, rank, world_size
from recipes.evaluation import harness_tasks, packed_lm
from recipes.evaluation.ranks import rank_0_first
from recipes.evaluation.results import (
    ROLES,
    TaskResult,
    TaskResults,
    compare_answers,
    compare_scores,
    score_of,
)
from recipes.evaluation.settings import HARNESS, EvaluateTasksConfig
from recipes.evaluation.task_answers import answer_tasks, require_same_items, write_samples
from recipes.evaluation.task_cache import TaskAnswers
from recipes.evaluation.text_quality import load_transformers, model_sha256


def score(
    cfg: EvaluateTasksConfig, inputs: Inputs, out: Path, log: MetricsLog
) -> TaskResults | None:
    """Evaluates all models, and the student's checkpoints that were saved during training.

    Ranks split the items. Rank 0 writes ``samples/<task>.jsonl`` (see ``write_samples``) and
    returns the results. Other ranks return ``None``.
    """
    if world_size() > 1:
        nemo.initialize(nemo.Parallelism())
    with rank_0_first():  # rank 0 downloads the data, the other ranks read it from the cache
        tasks = harness_tasks.load_tasks(
            cfg.tasks, cfg.source, cfg.num_fewshot, cfg.revisions, cfg.name
        )
    teacher = nemo.architecture_of(nemo.find_checkpoint(inputs["teacher"].artifact))
    fix = f"remove the task from stages.{cfg.name}.tasks"
    harness_tasks.require_room_for_text(tasks, teacher.max_position_embeddings, fix)
    step_checkpoints = nemo.step_checkpoints(inputs["distilled"].artifact)
    # The keys of these three dicts are models: roles, or ``step N``.
    paths = {role: nemo.find_checkpoint(inputs[role].artifact) for role in ROLES}
    paths |= {f"step {step}": path for step, path in step_checkpoints.items()}
    answers: dict[str, dict[str, TaskAnswers]] = {}  # the inner keys are tasks
    cached_tasks: dict[str, list[str]] = {}  # tasks whose answers were in the cache
    for name, path in paths.items():
        answers[name], cached_tasks[name] = _load_and_answer(cfg, name, path, tasks, log)
        gc.collect()  # frees the model, which reference cycles may keep in memory
    if rank() != 0:
        return None
    (out / "samples").mkdir()
    results = {}
    for task in tasks:
        items = {name: answers[name][task.name].items for name in paths}
        require_same_items(task.name, items)
        write_samples(out / "samples" / f"{task.name}.jsonl", items)
        scores = compare_scores(task.metric, items)
        results[task.name] = TaskResult(
            **vars(scores),  # the fields of the base class, ``TaskScores``
            version=task.version,
            split=task.split,
            num_fewshot=task.num_fewshot,
            data=task.data,
            seconds={name: answers[name][task.name].seconds for name in paths},
            answers=compare_answers(items),
            steps={step: score_of(task.metric, items[f"step {step}"]) for step in step_checkpoints},
        )
    return TaskResults(results, cached_tasks, f"lm_eval {HARNESS}, {dtype_name(cfg.precision)}")


def _load_and_answer(
    cfg: EvaluateTasksConfig,
    name: str,
    path: Path,
    tasks: list[harness_tasks.Task],
    log: MetricsLog,
) -> tuple[dict[str, TaskAnswers], list[str]]:
    """Loads one model. Returns its answers by task, and the tasks whose answers were cached."""
    model = load_model(path, dtype_of(cfg.precision))
    tokenizer = AutoTokenizer.from_pretrained(nemo.side_folder(path), trust_remote_code=False)
    progress = partial(log.progress, f"requests, {name}")
    packed_model = packed_lm.PackedLM(model, tokenizer, cfg.pack_tokens, progress)
    return answer_tasks(cfg, name, packed_model, lambda: model_sha256(model, path), tasks, log)


def load_model(checkpoint: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads a NeMo checkpoint with its generation settings, such as a repetition penalty.

    lm-eval itself uses ``from_pretrained``, which also loads these settings.
    """
    model, folder = load_transformers(checkpoint, dtype), nemo.side_folder(checkpoint)
    if (folder / GENERATION_CONFIG).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
