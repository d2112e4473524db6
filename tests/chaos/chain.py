"""Overrides of a tiny run (a chain of stages) for tests that kill it; compares two runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.core.manifest import ARTIFACT, MANIFEST
from recipes.core.metrics import METRICS, read_records
from tests.support.runs import manifest_of, settings, tiny

STEPS, CHECKPOINT_INTERVAL = 24, 4
"""Optimizer steps of the stage ``distill``, and steps between two checkpoints."""
TIMED = re.compile(
    r"(seconds|_per_second|_ms|_at|rss_bytes|peak_memory_bytes)$"  # ends of names
    r"|^(time|speedup|(prefill|decode)(_roofline)?|cached)$"  # whole names
)
"""Matches names of metrics that differ between any two runs: times, memory, and use of caches."""
_NUMBER = r"<data[^>]*>[^<]*</data>"  # a number in the report
SPEED = re.compile(
    rf"{_NUMBER}(?= tokens per second|: the plan differs)"  # a number before one of these texts
    rf"|(?<=: the plan differs by ){_NUMBER}"  # a number after this text
)
"""Matches speeds in the report, and their difference."""
SECTION = re.compile(r'<section id="(\w+)">.*?</section>', re.DOTALL)
"""Matches a section of the report. Group 1 is the section's id."""


def overrides(
    model: Path, text_file: Path, run_dir: Path, engine: str = "openvino", served: str = "gguf"
) -> list[str]:
    """Returns the overrides of a run that prunes width and depth to odd sizes.

    Args:
        model: Folder of a Hugging Face model, at least as large as ``tests.support.models.ODD``.
        text_file: JSON lines.
        run_dir: Run directory to write.
        engine: Option of ``conf/engine``, or ``null``. Only with ``openvino``, the run also exports
            a GGUF file, evaluates the served model and measures speed.
        served: Option of ``conf/served``; has an effect only with ``openvino``.
    """
    engine_settings = [
        "gguf=q8_0",
        f"served={served}",
        *settings("evaluate_served", tasks="[piqa]", limit=4, num_sequences=2),
        *settings("build_engine", num_sequences=2),
        *settings("build_teacher_engine", num_sequences=2),
        *settings("measure_speed", batch_sizes="[1,3]", prompt_tokens="[40]"),
        *settings("measure_speed", new_tokens=6, repetitions=2),
    ]
    return [
        "recipe=llama_width_prune",
        "tasks=null",
        "heal=least_squares",
        f"engine={engine}",
        *tiny(model, text_file, run_dir),
        *settings("prune", target_hidden_size=40, hidden_size_divisor=8),
        *settings("prune", target_ffn_hidden_size=72, ffn_hidden_size_divisor=8),
        *settings("prune", target_num_attention_heads=5, target_num_layers=4),
        *settings("distill", precision="bf16-mixed"),  # the default depends on the processor
        *settings("distill", max_steps=STEPS, warmup_steps=2, val_check_interval=12),
        *settings("distill", checkpoint_interval=CHECKPOINT_INTERVAL),
        *settings("evaluate", num_sequences=8, new_tokens=8),
        *(engine_settings if engine == "openvino" else []),
    ]


def differences(expected: Path, actual: Path) -> list[str]:
    """Lists differences between two run directories in results, records, files and reports.

    Measured times and memory may differ.
    """
    stages = sorted(file.parent.name for file in expected.glob(f"*/{MANIFEST}"))
    actual_stages = sorted(file.parent.name for file in actual.glob(f"*/{MANIFEST}"))
    if stages != actual_stages:
        return [f"complete stages are {actual_stages}, not {stages}"]
    messages = [f"{name}: only in one run" for name in sorted(_paths(expected) ^ _paths(actual))]
    for stage in stages:
        messages += [f"{stage}: {item}" for item in _stage_differences(expected, actual, stage)]
    return messages


def _paths(run_dir: Path) -> set[str]:
    """Returns the relative paths in a run directory, except logs and compiled Python files."""
    paths = (path.relative_to(run_dir) for path in run_dir.rglob("*"))
    not_compiled = (path for path in paths if "__pycache__" not in path.parts)
    return {str(path) for path in not_compiled if path.parts[1:2] != ("logs",)}  # STAGE/logs/...


def _stage_differences(expected_run: Path, actual_run: Path, stage: str) -> Iterator[str]:
    """Yields what differs between the results of a stage in two runs."""
    expected, actual = manifest_of(expected_run, stage), manifest_of(actual_run, stage)
    for name in ("fingerprint", "config", "architecture", "parameters", "tokenizer_sha256"):
        if getattr(expected, name) != getattr(actual, name):
            yield name
    if timeless(expected.metrics) != timeless(actual.metrics):
        yield f"metrics {timeless(expected.metrics)} became {timeless(actual.metrics)}"
    if _last_records(expected_run / stage / METRICS) != _last_records(actual_run / stage / METRICS):
        yield "records of progress"
    for name in expected.files.keys() & actual.files.keys():
        if expected.files[name].sha256 == actual.files[name].sha256:
            continue
        # Hashes also differ if only times, or the order of weights, differ.
        expected_file, actual_file = (
            run / stage / ARTIFACT / name for run in (expected_run, actual_run)
        )
        if content(expected_file) != content(actual_file):
            yield f"content of {name}"


def _last_records(file: Path) -> dict[tuple[str, int], Any]:
    """Returns the last record of each unit of work, such as a step, without times.

    A key is a task and a unit's number. If a resumed stage repeats a unit, the last record counts.
    The teacher's loss is omitted, because every start of a stage measures it again. Records of
    requests to a model are omitted, because a resumed stage does not repeat the requests.
    """
    records = [{k: v for k, v in r.items() if k != "teacher_loss"} for r in read_records(file)]
    unit_records = [r for r in records if "task" in r and not r["task"].startswith("requests")]
    return {(r["task"], r["done"]): timeless(r) for r in unit_records}


def timeless(value: Any) -> Any:
    """Copies nested dicts and lists without the keys that ``TIMED`` matches."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not TIMED.search(str(k))}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def content(file: Path) -> object:
    """Returns a file's content in a form that is the same in two runs with the same results.

    Times are omitted, and weights are compared independently of their order in the file.
    """
    if file.suffix == ".html":
        text = SPEED.sub("", file.read_text(encoding="utf-8"))
        sections = {m[1]: m[0] for m in SECTION.finditer(text)}
        # These two sections contain times.
        return {name: s for name, s in sections.items() if name not in ("cost", "provenance")}
    if file.suffix == ".json":
        return timeless(json.loads(file.read_text(encoding="utf-8")))
    if file.suffix == ".distcp" or file.name == ".metadata":
        return _weight_hashes(file.parents[1])  # CHECKPOINT/weights/FILE
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _weight_hashes(checkpoint: Path) -> dict[str, str]:
    """Returns a hash of each weight of a NeMo checkpoint, by the weight's Hugging Face name."""
    import torch

    from nemo_convert.convert import hf_weights

    return {
        name: hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, weight in hf_weights(checkpoint)
    }


def is_of_a_library(folder: Path) -> bool:
    """Returns whether a temporary folder belongs to a library, so that it may remain after a run.

    Such folders are torch's compile cache, and folders of multiprocessing that contain only
    sockets. Megatron's checkpoint writer leaves its socket behind if it is killed.
    """
    if folder.name.startswith("torchinductor_"):
        return True
    return folder.name.startswith("pymp-") and all(path.is_socket() for path in folder.iterdir())
