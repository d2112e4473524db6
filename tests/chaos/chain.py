"""Overrides of a tiny run that tests kill, and the comparison of two such runs."""

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
TIMED = re.compile(
    r"(seconds|_per_second|_ms|^time|_at|rss_bytes|peak_memory_bytes"
    r"|^speedup|^(prefill|decode)(_roofline)?|^cached)$"
)
"""Matches names of metrics that differ between any two runs: times, memory, and use of caches."""
_NUMBER = r"<data[^>]*>[^<]*</data>"
SPEED = re.compile(rf"{_NUMBER}(?= tokens per second|: the plan is)|(?<=: the plan is ){_NUMBER}")
"""Matches measured speeds in the report."""
SECTION = re.compile(r'<section id="(\w+)">.*?</section>', re.DOTALL)


def overrides(
    model: Path, text_file: Path, run_dir: Path, engine: str = "openvino", served: str = "gguf"
) -> list[str]:
    """Returns the overrides of a run that prunes width and depth to odd sizes."""
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
    """Lists differences of two runs in results, records, files and reports, apart from times."""
    stages = sorted(file.parent.name for file in expected.glob(f"*/{MANIFEST}"))
    actual_stages = sorted(file.parent.name for file in actual.glob(f"*/{MANIFEST}"))
    if stages != actual_stages:
        return [f"complete stages are {actual_stages}, not {stages}"]
    found = [f"{name}: only in one run" for name in sorted(_paths(expected) ^ _paths(actual))]
    for stage in stages:
        found += [f"{stage}: {item}" for item in _stage_differences(expected, actual, stage)]
    return found


def _paths(run_dir: Path) -> set[str]:
    """Returns the relative paths of a run, without logs and the snapshot's compiled files."""
    paths = (path.relative_to(run_dir) for path in run_dir.rglob("*"))
    compared = (path for path in paths if "__pycache__" not in path.parts)
    return {str(path) for path in compared if path.parts[1:2] != ("logs",)}


def _stage_differences(expected_run: Path, actual_run: Path, stage: str) -> Iterator[str]:
    expected, actual = manifest_of(expected_run, stage), manifest_of(actual_run, stage)
    for name in ("fingerprint", "config", "architecture", "parameters", "tokenizer_sha256"):
        if getattr(expected, name) != getattr(actual, name):
            yield name
    if timeless(expected.metrics) != timeless(actual.metrics):
        yield f"metrics {timeless(expected.metrics)} became {timeless(actual.metrics)}"
    records = [_last_records(run / stage / METRICS) for run in (expected_run, actual_run)]
    if records[0] != records[1]:
        yield "records of progress"
    for name in expected.files.keys() & actual.files.keys():
        files = [run / stage / ARTIFACT / name for run in (expected_run, actual_run)]
        is_equal = expected.files[name].sha256 == actual.files[name].sha256
        if not is_equal and content(files[0]) != content(files[1]):
            yield f"content of {name}"


def _last_records(file: Path) -> dict[tuple[str, int], Any]:
    """Returns the last record of each unit of work, such as a step, without times.

    Omits the teacher's loss, which every start of a stage measures again, and records of requests
    to a model, which a resumed stage does not repeat.
    """
    records = [{k: v for k, v in r.items() if k != "teacher_loss"} for r in read_records(file)]
    units = [r for r in records if "task" in r and not r["task"].startswith("requests")]
    return {(r["task"], r["done"]): timeless(r) for r in units}


def timeless(value: Any) -> Any:
    """Returns nested dicts and lists without the keys that ``TIMED`` matches."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not TIMED.search(str(k))}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def content(file: Path) -> object:
    """Returns the content of a file in a form that is equal in two equal runs."""
    if file.suffix == ".html":
        text = SPEED.sub("", file.read_text(encoding="utf-8"))
        sections = {m[1]: m[0] for m in SECTION.finditer(text)}
        # Both omitted sections have times.
        return {n: s for n, s in sections.items() if n not in ("cost", "provenance")}
    if file.suffix == ".json":
        return timeless(json.loads(file.read_text(encoding="utf-8")))
    if file.suffix == ".distcp" or file.name == ".metadata":
        return _weights(file.parents[1])
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _weights(checkpoint: Path) -> dict[str, str]:
    """Returns a hash of each weight of a NeMo checkpoint, whose files have weights in any order."""
    import torch

    from nemo_convert.convert import hf_weights

    return {
        name: hashlib.sha256(w.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, w in hf_weights(checkpoint)
    }


def is_of_a_library(folder: Path) -> bool:
    """Whether a temporary folder is torch's cache, or multiprocessing's folder with only sockets.

    Megatron's checkpoint writer leaves its socket if it is killed.
    """
    if folder.name.startswith("torchinductor_"):
        return True
    return folder.name.startswith("pymp-") and all(path.is_socket() for path in folder.iterdir())
