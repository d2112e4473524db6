"""A tiny chain that tests kill, and the comparison of two runs of it."""

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
"""Matches metrics that differ between any two runs: times, memory, and the use of caches."""
_FIGURE = r"<data[^>]*>[^<]*</data>"
SPEED = re.compile(rf"{_FIGURE}(?= tokens per second|: the plan is)|(?<=: the plan is ){_FIGURE}")
SECTION = re.compile(r'<section id="(\w+)">.*?</section>', re.DOTALL)


def overrides(
    model: Path, text_file: Path, run_dir: Path, engine: str = "openvino", served: str = "gguf"
) -> list[str]:
    """Returns the overrides of a chain that prunes width and depth to odd sizes."""
    engines = [
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
        *settings("distill", precision="bf16-mixed"),  # by default it depends on the processor
        *settings("distill", max_steps=STEPS, warmup_steps=2, val_check_interval=12),
        *settings("distill", checkpoint_interval=CHECKPOINT_INTERVAL),
        *settings("evaluate", num_sequences=8, new_tokens=8),
        *(engines if engine == "openvino" else []),
    ]


def differences(expected: Path, found: Path) -> list[str]:
    """Lists differences of two runs in results, records, files and reports, apart from times."""
    stages = sorted(file.parent.name for file in expected.glob(f"*/{MANIFEST}"))
    found_stages = sorted(file.parent.name for file in found.glob(f"*/{MANIFEST}"))
    if stages != found_stages:
        return [f"complete are {found_stages}, not {stages}"]
    different = [f"{name}: only in one" for name in sorted(_paths(expected) ^ _paths(found))]
    for stage in stages:
        different += [f"{stage}: {what}" for what in _stage_differences(expected, found, stage)]
    return different


def _paths(run_dir: Path) -> set[str]:
    every = (path.relative_to(run_dir) for path in run_dir.rglob("*"))
    files = (path for path in every if "__pycache__" not in path.parts)  # of the snapshot
    return {str(path) for path in files if path.parts[1:2] != ("logs",)}


def _stage_differences(expected: Path, found: Path, stage: str) -> Iterator[str]:
    one, two = manifest_of(expected, stage), manifest_of(found, stage)
    for name in ("fingerprint", "config", "architecture", "parameters", "tokenizer_sha256"):
        if getattr(one, name) != getattr(two, name):
            yield name
    if timeless(one.metrics) != timeless(two.metrics):
        yield f"metrics {timeless(one.metrics)} became {timeless(two.metrics)}"
    steps = [_steps(run / stage / METRICS) for run in (expected, found)]
    if steps[0] != steps[1]:
        yield "records of progress"
    for name in one.files.keys() & two.files.keys():
        first, second = (run / stage / ARTIFACT / name for run in (expected, found))
        if one.files[name].sha256 != two.files[name].sha256 and content(first) != content(second):
            yield f"content of {name}"


def _steps(file: Path) -> dict[tuple[str, int], Any]:
    """Returns the last record of each unit of work, without times.

    Left out are the teacher's loss, which each start measures anew, and requests to a model, which
    are not repeated.
    """
    every = [{k: v for k, v in r.items() if k != "teacher_loss"} for r in read_records(file)]
    units = [r for r in every if "task" in r and not r["task"].startswith("requests")]
    return {(r["task"], r["done"]): timeless(r) for r in units}


def timeless(value: Any) -> Any:
    """Returns plain data without ``TIMED`` metrics."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not TIMED.search(str(k))}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def content(file: Path) -> object:
    """Returns the content of a file, without times if it has any."""
    if file.suffix == ".html":
        text = SPEED.sub("", file.read_text(encoding="utf-8"))
        sections = {m[1]: m[0] for m in SECTION.finditer(text)}
        return {n: s for n, s in sections.items() if n not in ("cost", "provenance")}
    if file.suffix == ".json":
        return timeless(json.loads(file.read_text(encoding="utf-8")))
    if file.suffix == ".distcp" or file.name == ".metadata":
        return _weights(file.parents[1])
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _weights(checkpoint: Path) -> dict[str, str]:
    """Returns a hash of each weight of a NeMo checkpoint, whose order in the files varies."""
    import torch

    from nemo_convert.convert import hf_weights

    return {
        name: hashlib.sha256(w.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, w in hf_weights(checkpoint)
    }


def is_of_a_library(folder: Path) -> bool:
    """Returns whether a temporary folder is torch's cache, or multiprocessing's with only sockets.

    A killed process of Megatron's checkpoint writer leaves its socket.
    """
    if folder.name.startswith("torchinductor_"):
        return True
    return folder.name.startswith("pymp-") and all(path.is_socket() for path in folder.iterdir())
