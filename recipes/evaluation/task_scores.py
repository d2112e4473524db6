"""Evaluates models on benchmarks. Uses cached answers if there are any."""

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
from recipes.evaluation import packed_lm
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
    """Evaluates all models, and the student as saved at earlier steps, one at a time.

    Ranks split the items. Rank 0 writes ``samples/<task>.jsonl``, with one item and all models'
    responses per line, and returns the results; other ranks return ``None``.
    """
    if world_size() > 1:
        nemo.initialize(nemo.Parallelism())
    with rank_0_first():  # rank 0 downloads the data
        tasks = packed_lm.load_tasks(cfg.tasks, cfg.source, cfg.num_fewshot, cfg.revisions)
    answers: dict[str, dict[str, TaskAnswers]] = {}
    cached: dict[str, list[str]] = {}
    students = nemo.step_checkpoints(inputs["distilled"].artifact)
    paths = {role: nemo.find_checkpoint(inputs[role].artifact) for role in ROLES}
    paths |= {f"step {step}": path for step, path in students.items()}
    for name, path in paths.items():
        answers[name], cached[name] = _answers(cfg, name, path, tasks, log)
        gc.collect()
    if rank() != 0:
        return None
    (out / "samples").mkdir()
    results = {}
    for task in tasks:
        items = {name: answers[name][task.name].items for name in paths}
        require_same_items(task.name, items)
        write_samples(out / "samples" / f"{task.name}.jsonl", items)
        results[task.name] = TaskResult(
            **vars(compare_scores(task.metric, items)),
            version=task.version,
            split=task.split,
            num_fewshot=task.num_fewshot,
            data=task.data,
            seconds={name: answers[name][task.name].seconds for name in paths},
            answers=compare_answers(items),
            steps={step: score_of(task.metric, items[f"step {step}"]) for step in students},
        )
    return TaskResults(results, cached, f"lm_eval {HARNESS}, {dtype_name(cfg.precision)}")


def _answers(
    cfg: EvaluateTasksConfig,
    name: str,
    path: Path,
    tasks: list[packed_lm.Task],
    log: MetricsLog,
) -> tuple[dict[str, TaskAnswers], list[str]]:
    """Loads one model; returns its answers by task, and the names of cached tasks."""
    model = load_model(path, dtype_of(cfg.precision))
    tokenizer = AutoTokenizer.from_pretrained(nemo.side_folder(path), trust_remote_code=False)
    packed = packed_lm.PackedLM(
        model, tokenizer, cfg.pack_tokens, partial(log.progress, f"requests, {name}")
    )
    return answer_tasks(cfg, name, packed, lambda: model_sha256(model, path), tasks, log)


def load_model(checkpoint: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads a NeMo checkpoint with its generation settings, such as a repetition penalty.

    lm-eval generates with these settings, because ``from_pretrained`` reads them. It only disables
    sampling.
    """
    model = load_transformers(checkpoint, dtype)
    if (nemo.side_folder(checkpoint) / GENERATION_CONFIG).exists():
        model.generation_config = GenerationConfig.from_pretrained(nemo.side_folder(checkpoint))
    return model
