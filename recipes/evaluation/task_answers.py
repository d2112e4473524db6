"""Runs models on benchmarks. Uses cached answers if there are any. Does not import NeMo."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.backend.device import device
from recipes.core.errors import RecipeError
from recipes.core.files import write_text_atomically
from recipes.core.fingerprint import code_fingerprint
from recipes.core.metrics import MetricsLog
from recipes.core.stage import rank
from recipes.core.versions import installed_version
from recipes.evaluation import packed_lm
from recipes.evaluation.ranks import broadcast
from recipes.evaluation.results import Item
from recipes.evaluation.settings import HARNESS, EvaluateTasksConfig
from recipes.evaluation.task_cache import TaskAnswers, look_up, store

LIBRARIES = ("torch", "transformers")
"""Libraries whose versions are part of a cache key, besides lm-eval."""


def answer_tasks(
    cfg: EvaluateTasksConfig,
    name: str,
    model: packed_lm.PackedLM,
    identity: Callable[[], str],
    tasks: list[packed_lm.Task],
    log: MetricsLog,
) -> tuple[dict[str, TaskAnswers], list[str]]:
    """Answers the tasks that are not cached; returns answers by task, and names of cached tasks.

    Only rank 0 reads and writes the cache, so that all ranks answer the same tasks. Other ranks
    return no answers. ``name`` is shown in the log; ``identity`` returns the model's hash.
    """
    keys: dict[str, dict[str, Any]] = {}
    answers: dict[str, TaskAnswers] = {}
    if rank() == 0:
        model_hash = identity()
        keys = {task.name: _cache_key(cfg, model_hash, task) for task in tasks}
        answers = {task: answer for task, key in keys.items() if (answer := look_up(key))}
    cached = broadcast(list(answers))
    for number, task in enumerate(tasks, 1):
        if task.name not in cached:
            start = time.monotonic()
            items = packed_lm.answer(model, task, cfg.limit, cfg.seed)
            if rank() == 0:
                answers[task.name] = TaskAnswers(items, round(time.monotonic() - start, 3))
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
        "libraries": ", ".join(f"{name} {installed_version(name)}" for name in LIBRARIES),
    }


def require_same_items(task: str, items: dict[str, list[Item]]) -> None:
    """Raises ``RecipeError`` unless models answered the same items in the same order."""
    hashes = {tuple((item.id, item.hash) for item in answers) for answers in items.values()}
    if len(hashes) != 1:
        raise RecipeError(
            f"the models answered different items of {task}: its data changed between evaluations",
            "delete the folder evaluations in the cache",
        )


def write_samples(path: Path, items: dict[str, list[Item]]) -> None:
    """Writes one item and all models' responses per line."""
    lines = []
    for item_by_model in zip(*items.values(), strict=True):
        responses = {
            role: {"response": item.response, **item.metrics}
            for role, item in zip(items, item_by_model, strict=True)
        }
        first = item_by_model[0]
        question = {"id": first.id, "doc": first.doc, "target": first.target}
        lines.append(json.dumps({**question, **responses}, ensure_ascii=False) + "\n")
    write_text_atomically(path, "".join(lines))
