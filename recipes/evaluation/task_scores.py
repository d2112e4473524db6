"""Evaluates models on benchmarks. Uses cached answers if there are any."""

from __future__ import annotations

import gc
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from nemo_convert import nemo
from recipes.backend.device import device
from recipes.core.errors import RecipeError
from recipes.core.files import write_text_atomically
from recipes.core.fingerprint import code_fingerprint
from recipes.core.metrics import MetricsLog
from recipes.core.precision import dtype_name, dtype_of
from recipes.core.stage import Inputs, rank, world_size
from recipes.core.versions import installed
from recipes.evaluation import packed_lm
from recipes.evaluation.ranks import broadcast, rank_0_first
from recipes.evaluation.results import (
    ROLES,
    Item,
    TaskResult,
    TaskResults,
    compare,
    compare_answers,
    score_of,
)
from recipes.evaluation.settings import HARNESS, EvaluateTasksConfig
from recipes.evaluation.task_cache import Answer, look_up, store
from recipes.evaluation.text_quality import load_transformers, model_sha256

LIBRARIES = ("torch", "transformers")
"""Libraries that compute an answer, besides lm-eval."""


def score(
    cfg: EvaluateTasksConfig, inputs: Inputs, out: Path, log: MetricsLog
) -> TaskResults | None:
    """Evaluates all models and students of earlier steps, one in memory at a time.

    Ranks split the items. Rank 0 writes ``samples/<task>.jsonl``, with one item and all models'
    responses per line, and returns the results; other ranks return ``None``.
    """
    if world_size() > 1:
        nemo.initialize(nemo.Parallelism())
    with rank_0_first():  # downloads
        tasks = packed_lm.load_tasks(cfg.tasks, cfg.source, cfg.num_fewshot, cfg.revisions)
    answers: dict[str, dict[str, Answer]] = {}
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
        _require_same_items(task.name, items)
        _write_samples(out / "samples" / f"{task.name}.jsonl", items)
        results[task.name] = TaskResult(
            **vars(compare(task.metric, items)),
            version=task.version,
            seconds={name: answers[name][task.name].seconds for name in paths},
            answers=compare_answers(items),
            steps={step: score_of(task.metric, items[f"step {step}"]) for step in students},
        )
    data = ", ".join(dict.fromkeys(task.data for task in tasks))
    return TaskResults(results, cached, f"lm_eval {HARNESS}, {dtype_name(cfg.precision)}", data)


def _answers(
    cfg: EvaluateTasksConfig,
    name: str,
    path: Path,
    tasks: list[packed_lm.Task],
    log: MetricsLog,
) -> tuple[dict[str, Answer], list[str]]:
    """Returns one model's answers by task, and the names of tasks whose answers were cached.

    Rank 0 alone reads and writes the cache, so that all ranks answer the same tasks. Other ranks
    return no answers.
    """
    model = load_transformers(path, dtype_of(cfg.precision))
    tokenizer = AutoTokenizer.from_pretrained(nemo.side_folder(path), trust_remote_code=False)
    packed = packed_lm.PackedLM(
        model, tokenizer, cfg.pack_tokens, partial(log.progress, f"requests, {name}")
    )
    keys: dict[str, dict[str, Any]] = {}
    answers: dict[str, Answer] = {}
    if rank() == 0:
        model_hash = model_sha256(model, path)
        keys = {task.name: _cache_key(cfg, model_hash, task) for task in tasks}
        answers = {task: answer for task, key in keys.items() if (answer := look_up(key))}
    cached = broadcast(list(answers))
    for number, task in enumerate(tasks, 1):
        if task.name not in cached:
            start = time.monotonic()
            items = packed_lm.answer(packed, task, cfg.limit, cfg.seed)
            if rank() == 0:
                answers[task.name] = Answer(items, round(time.monotonic() - start, 3))
                store(keys[task.name], answers[task.name])
        log.progress(f"tasks, {name}", number, len(tasks))
    return answers, cached


def _cache_key(cfg: EvaluateTasksConfig, model_hash: str, task: packed_lm.Task) -> dict[str, Any]:
    return {
        "model": model_hash,
        "task": task.name,
        "version": task.version,
        "data": task.data,
        "limit": cfg.limit,
        "num_fewshot": cfg.num_fewshot.get(task.name),
        "seed": cfg.seed,
        "harness": HARNESS,
        "code": code_fingerprint(packed_lm.__name__),
        "device": device(),
        "libraries": ", ".join(f"{name} {installed(name)}" for name in LIBRARIES),
    }


def _require_same_items(task: str, items: dict[str, list[Item]]) -> None:
    """Raises ``RecipeError`` unless models answered the same items in the same order."""
    hashes = {tuple((item.id, item.hash) for item in answered) for answered in items.values()}
    if len(hashes) != 1:
        raise RecipeError(
            f"the models answered different items of {task}: its data changed between evaluations",
            "delete the folder evaluations in the cache",
        )


def _write_samples(path: Path, items: dict[str, list[Item]]) -> None:
    lines = []
    for same_item in zip(*items.values(), strict=True):
        responses = {
            role: {"response": item.response, **item.metrics}
            for role, item in zip(items, same_item, strict=True)
        }
        first = same_item[0]
        question = {"id": first.id, "doc": first.doc, "target": first.target}
        lines.append(json.dumps({**question, **responses}, ensure_ascii=False) + "\n")
    write_text_atomically(path, "".join(lines))
