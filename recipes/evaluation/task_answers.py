"""Runs models on benchmarks, unless their answers are cached. Does not import NeMo."""

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
from recipes.core.wheels import cache_dir
from recipes.evaluation import harness_tasks, packed_lm
from recipes.evaluation.ranks import broadcast
from recipes.evaluation.results import Item
from recipes.evaluation.settings import HARNESS, EvaluateTasksConfig
from recipes.evaluation.task_cache import FOLDER, TaskAnswers, look_up, store

LIBRARIES = ("torch", "transformers")
"""Libraries whose versions are part of a cache key, besides lm-eval."""


def answer_tasks(
    cfg: EvaluateTasksConfig,
    name: str,
    model: packed_lm.PackedLM,
    identity: Callable[[], str],
    tasks: list[harness_tasks.Task],
    log: MetricsLog,
) -> tuple[dict[str, TaskAnswers], list[str]]:
    """Returns a model's answers by task, and the names of the tasks whose answers were cached.

    Only rank 0 reads and writes the cache, so that all ranks run the model on the same tasks. On
    other ranks, the returned answers are empty. ``identity`` returns a text that identifies the
    model, such as a hash. Only rank 0 calls it. ``name`` is the model's name in the log.
    """
    keys: dict[str, dict[str, Any]] = {}
    answers: dict[str, TaskAnswers] = {}
    if rank() == 0:
        model_identity = identity()
        for task in tasks:
            keys[task.name] = _cache_key(cfg, model_identity, task)
            if (cached_answers := look_up(keys[task.name])) is not None:
                answers[task.name] = cached_answers
    cached_tasks = broadcast(list(answers))
    for number, task in enumerate(tasks, 1):
        if task.name not in cached_tasks:
            start = time.monotonic()
            # All ranks take part; each returns all items.
            items = harness_tasks.answer(model, task, cfg.limit, cfg.seed)
            if rank() == 0:
                answers[task.name] = TaskAnswers(items, round(time.monotonic() - start, 3))
                try:
                    store(keys[task.name], answers[task.name])
                except RecipeError as error:  # a shared cache may be read-only
                    print(f"warning: {error.what} The answers are not cached.", flush=True)
        log.progress(f"tasks, {name}", number, len(tasks))
    return answers, cached_tasks


def _cache_key(
    cfg: EvaluateTasksConfig, model_identity: str, task: harness_tasks.Task
) -> dict[str, Any]:
    return {
        "model": model_identity,
        "task": task.name,
        "version": task.version,
        "data": task.data,
        "limit": cfg.limit,
        "num_fewshot": cfg.num_fewshot.get(task.name),
        "seed": cfg.seed,
        "harness": HARNESS,
        "code": code_fingerprint(packed_lm.__name__, harness_tasks.__name__),
        "device": device(),
        "libraries": ", ".join(f"{name} {installed_version(name)}" for name in LIBRARIES),
    }


def require_same_items(task: str, items: dict[str, list[Item]]) -> None:
    """Raises ``RecipeError`` unless all models (the keys) answered the same items in one order."""
    item_lists = {tuple((item.id, item.hash) for item in answers) for answers in items.values()}
    if len(item_lists) != 1:  # a set, so equal lists count once
        raise RecipeError(
            f"the models answered different items of {task}: its data changed between evaluations",
            f"delete {cache_dir() / FOLDER}",
        )


def write_samples(path: Path, items: dict[str, list[Item]]) -> None:
    """Writes a JSON line per item, with the responses and metrics of all models.

    ``items`` maps each model to the same items in the same order.
    """
    lines = []
    for item_of_models in zip(*items.values(), strict=True):  # one item, as each model answered it
        first = item_of_models[0]  # its id, doc and target are those of all models
        line = {"id": first.id, "doc": first.doc, "target": first.target}
        for model, item in zip(items, item_of_models, strict=True):
            line[model] = {"response": item.response, **item.metrics}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text_atomically(path, "".join(lines))
