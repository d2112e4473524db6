"""Every model's answers to every task, from the cache where they were given before."""

from __future__ import annotations

import gc
import json
import time
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer

from nemo_convert import nemo
from recipes.backend.device import device
from recipes.core.errors import RecipeError
from recipes.core.files import write_text_atomically
from recipes.core.fingerprint import code_fingerprint
from recipes.core.metrics import MetricsLog
from recipes.core.precision import dtype_of, number_type
from recipes.core.stage import Input, Inputs
from recipes.core.versions import installed
from recipes.evaluation import packed_lm
from recipes.evaluation.paired import answers as answers_of
from recipes.evaluation.paired import compare
from recipes.evaluation.results import ROLES, Item, TaskResult, TaskResults
from recipes.evaluation.settings import HARNESS, EvaluateTasksConfig
from recipes.evaluation.task_cache import Answer, Question, look_up, store
from recipes.evaluation.text_quality import load_transformers, model_sha256

LIBRARIES = ("torch", "transformers")
"""What computes an answer beside lm-eval and our own code."""
Answers = dict[str, dict[str, Answer]]
"""By task, then role."""


def score(cfg: EvaluateTasksConfig, inputs: Inputs, out: Path, log: MetricsLog) -> TaskResults:
    """Evaluates all models, one in memory at a time.

    Writes ``samples/<task>.jsonl``, an item a line with what each model said.
    """
    tasks = packed_lm.load_tasks(cfg.tasks, cfg.source, cfg.num_fewshot, cfg.revisions)
    answers: Answers = {task.name: {} for task in tasks}
    cached: dict[str, list[str]] = {}
    for role in ROLES:
        cached[role] = []
        for name, (answer, from_cache) in _ask(cfg, role, inputs[role], tasks, log).items():
            answers[name][role] = answer
            cached[role] += [name] * from_cache
        gc.collect()
    (out / "samples").mkdir()
    results = {}
    for task in tasks:
        items = {role: answer.items for role, answer in answers[task.name].items()}
        _require_same_items(task.name, items)
        _write_samples(out / "samples" / f"{task.name}.jsonl", items)
        results[task.name] = TaskResult(
            **vars(compare(task.metric, items)),
            version=task.version,
            seconds={role: a.seconds for role, a in answers[task.name].items()},
            answers=answers_of(items),
        )
    data = ", ".join(dict.fromkeys(task.data for task in tasks))
    return TaskResults(results, cached, f"lm_eval {HARNESS}, {number_type(cfg.precision)}", data)


def _ask(
    cfg: EvaluateTasksConfig,
    role: str,
    checkpoint: Input,
    tasks: list[packed_lm.Task],
    log: MetricsLog,
) -> dict[str, tuple[Answer, bool]]:
    """One model's answers, and whether each is from the cache."""
    path = nemo.find_checkpoint(checkpoint.artifact)
    model = load_transformers(path, dtype_of(cfg.precision))
    identity = model_sha256(model, path)
    tokenizer = AutoTokenizer.from_pretrained(nemo.side_files(path), trust_remote_code=False)
    packed = packed_lm.PackedLM(
        model, tokenizer, cfg.pack_tokens, partial(log.progress, f"requests, {role}")
    )
    found: dict[str, tuple[Answer, bool]] = {}
    for number, task in enumerate(tasks, 1):
        question = _question(cfg, identity, task)
        answer = look_up(question)
        found[task.name] = (answer or _do(cfg, packed, task), answer is not None)
        if answer is None:
            store(question, found[task.name][0])
        log.progress(f"tasks, {role}", number, len(tasks))
    return found


def _do(cfg: EvaluateTasksConfig, model: packed_lm.PackedLM, task: packed_lm.Task) -> Answer:
    began = time.monotonic()
    items = packed_lm.answer(model, task, cfg.limit, cfg.seed)
    return Answer(items, round(time.monotonic() - began, 3))


def _question(cfg: EvaluateTasksConfig, model: str, task: packed_lm.Task) -> Question:
    return Question(
        model=model,
        task=task.name,
        version=task.version,
        data=task.data,
        limit=cfg.limit,
        num_fewshot=cfg.num_fewshot.get(task.name),
        seed=cfg.seed,
        harness=HARNESS,
        code=code_fingerprint(packed_lm.__name__),
        device=device(),
        libraries=", ".join(f"{name} {installed(name)}" for name in LIBRARIES),
    )


def _require_same_items(task: str, items: dict[str, list[Item]]) -> None:
    """Paired figures need the same items in the same order."""
    asked = {role: [(item.id, item.hash) for item in each] for role, each in items.items()}
    if len({tuple(each) for each in asked.values()}) != 1:
        raise RecipeError(
            f"the models were not asked the same items of {task}.",
            "its data changed between two evaluations; delete the folder evaluations in the cache",
        )


def _write_samples(path: Path, items: dict[str, list[Item]]) -> None:
    lines = []
    for each in zip(*items.values(), strict=True):
        said = {
            role: {"response": item.response, **item.metrics}
            for role, item in zip(items, each, strict=True)
        }
        first = {"id": each[0].id, "doc": each[0].doc, "target": each[0].target}
        lines.append(json.dumps({**first, **said}, ensure_ascii=False) + "\n")
    write_text_atomically(path, "".join(lines))
