from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from recipes import distill, evaluate, export_hf, import_hf, prepare_data, prune, report
from recipes.architecture import Architecture
from recipes.manifest import ARTIFACT, FileStamp, Manifest, read_manifest, write_manifest
from recipes.metrics import METRICS, MetricsLog
from recipes.report_page import render
from recipes.stage import Input, StageConfig

LAYERS, DROPPED = 30, (9, 12, 13, 17, 20, 21)
TEACHER = Architecture("LlamaForCausalLM", LAYERS, 576, 1536, 9, 3, 64, 49152, 8192, True)
STUDENT = replace(TEACHER, num_layers=LAYERS - len(DROPPED), hidden_size=512, ffn_hidden_size=1152)
STEPS = 400
PLOTS = (
    "plot-quality",
    "plot-loss",
    "plot-val-loss",
    "plot-lr",
    "plot-grad-norm",
    "plot-layers",
    "plot-sizes",
    "plot-cost",
)
NASTY = "<script>document.title = 'owned'</script> & <b>bold</b>"
PHONE = 390


def wobble(step: int) -> float:
    return math.sin(step * 12.9898) * 0.5 + math.sin(step * 4.1414) * 0.5


def quality() -> dict[str, Any]:
    figures = {
        "teacher": (3.0214, 0.0412, 0.0, 1.0, TEACHER),
        "pruned": (6.8437, 0.0655, 3.9106, 0.1817, STUDENT),
        "distilled": (3.8125, 0.0467, 0.7231, 0.6042, STUDENT),
    }
    results = {
        role: {
            "loss": loss,
            "loss_standard_error": error,
            "perplexity": math.exp(loss),
            "kl_to_teacher": kl,
            "top1_agreement": agreement,
            "parameters": shape.parameters(),
        }
        for role, (loss, error, kl, agreement, shape) in figures.items()
    }
    return {**results, "windows": 40, "tokens": 10240, "recovered": 0.7930616922}


def generations() -> list[dict[str, str]]:
    return [
        {
            "prompt": "The Danube is Europe's second-longest river. It rises in the Black Forest and",
            "text": " flows south-east for 2,850 km, through ten countries, into the Black Sea.",
            "teacher": " flows through Germany, Austria, Hungary and Romania to the Black Sea.\n\nIts",
            "pruned": " the the of of the and the the, the of the, of the and and the of the the",
            "distilled": " flows through Austria, Slovakia and Hungary before it reaches the sea.",
        },
        {
            "prompt": "A prime number is a natural number greater than 1 that",
            "text": " is not a product of two smaller natural numbers.",
            "teacher": NASTY,
            "pruned": "AAAA" * 60,
            "distilled": " is a product of two or more natural numbers, such as 東京 or Привет.",
        },
    ]


def stage(
    root: Path,
    config: StageConfig,
    kind: str,
    files: dict[str, int],
    metrics: dict[str, Any] | None = None,
    shape: Architecture | None = None,
) -> Input:
    """Writes a stage's manifest as a run would, and reads it back; files are only stamps."""
    number = len(list(root.iterdir()))
    directory = root / config.stage
    (directory / ARTIFACT).mkdir(parents=True)
    data = json.loads(json.dumps(config, default=lambda value: vars(value)))
    manifest = Manifest(
        stage=config.stage,
        kind=kind,
        fingerprint=f"{number:x}f3c" * 16,
        config=data,
        code=f"c0de{number:x}" + "ab" * 29 + "c",
        inputs={},
        files={name: FileStamp(size, f"{size:064x}", 0) for name, size in files.items()},
        metrics=metrics or {},
        architecture=shape.as_dict() if shape else None,
        parameters=shape.parameters() if shape else None,
        tokenizer_sha256="70ce" * 16 if kind != "eval_results" else None,
        versions={"python": "3.11.9", "torch": "2.9.1", "nemo_toolkit": "2.7.3"},
        git_sha="0123456789abcdef0123456789abcdef01234567-dirty",
        started_at=f"2025-03-04T1{number}:20:30+00:00",
        seconds=round(11.7 * 4.3**number % 5000, 3),
        peak_rss_bytes=1_234_567_890 + 700_000_000 * number,
    )
    write_manifest(directory, manifest)
    found = read_manifest(directory)
    assert found
    return Input(directory, found)


def checkpoint(shape: Architecture) -> dict[str, int]:
    return {
        "model.nemo/context/model.yaml": 4321,
        "model.nemo/context/tokenizer.json": 2_104_556,
        "model.nemo/weights/__0_0.distcp": 4 * shape.parameters(),
        "model.nemo/weights/metadata.json": 118,
    }


def log_training(directory: Path, lm_weight: float) -> None:
    log = MetricsLog(directory / METRICS)
    for step in range(1, STEPS + 1):
        kd = 0.7 + 3 * math.exp(-step / 70) + 0.12 * wobble(step)
        lm = kd + 2.9 + 0.1 * wobble(step + 7)
        log.progress(
            "distill",
            step,
            STEPS,
            loss=kd + lm_weight * lm,
            kd=kd,
            lm=lm if lm_weight else 0.0,
            lr=1e-4 * min(step / 20, 0.55 + 0.45 * math.cos(math.pi * step / STEPS)),
            tokens_per_second=1210.4,
            grad_norm=1.1 + 4 * math.exp(-step / 40) + 0.3 * wobble(step + 3),
        )
        if step % 50 == 0:
            log.progress("validate", step, STEPS, val_loss=3.75 + 2.6 * math.exp(-step / 80))


def make_inputs(root: Path, *, lm_weight: float = 0.0) -> dict[str, Input]:
    root.mkdir()
    importance = {str(n): 0.07 + 0.3 / n + 0.02 * wobble(n) for n in range(1, LAYERS + 1)}
    kept = [n for n in range(1, LAYERS + 1) if n not in DROPPED]
    parts = {"train": 812_345, "validation": 17_001, "calibration": 34_567, "heldout": 33_210}
    source = "hf://some/corpus@en:train"
    parity = {"parity_max_logit_difference": 0.00011444091796875, "parity_tokens": 128}
    made = {
        "teacher": stage(
            root,
            import_hf.Config("import_hf", hf_path="some/SmallLM-135M-Instruct"),
            "checkpoint_nemo",
            checkpoint(TEACHER),
            {**parity, "licence": "apache-2.0"},
            TEACHER,
        ),
        "data": stage(
            root,
            prepare_data.Config("prepare_data", sources=[source]),
            "dataset",
            {f"{part}.{end}": 2 * count for part, count in parts.items() for end in ("bin", "idx")},
            {"documents": {p: n // 90 for p, n in parts.items()}, "tokens": parts, "sources": [source]},
        ),
        "pruned": stage(
            root,
            prune.Config(
                "prune", drop_layers=list(DROPPED), target_hidden_size=512,
                target_ffn_hidden_size=1152,
            ),
            "checkpoint_nemo",
            {**checkpoint(STUDENT), "importance.json": 900},
            {
                "kept_layers": kept,
                "layer_importance": importance,
                "calibration_tokens": 16384,
                "teacher_parameters": TEACHER.parameters(),
            },
            STUDENT,
        ),
        "distilled": stage(
            root,
            distill.Config("distill", max_steps=STEPS, lm_weight=lm_weight),
            "checkpoint_nemo",
            checkpoint(STUDENT),
            {"steps": STEPS, "tokens": STEPS * 1024, "tokens_per_second": 1210.4, "val_loss": 3.77},
            STUDENT,
        ),
        "evaluation": stage(
            root,
            evaluate.Config("evaluate"),
            "eval_results",
            {"results.json": 7890},
            quality(),
        ),
        "exported": stage(
            root,
            export_hf.Config("export_hf"),
            "checkpoint_hf",
            {"model.safetensors": 4 * STUDENT.parameters(), "config.json": 715},
            {**parity, "parity_max_logit_difference": 9.1552734375e-05},
            STUDENT,
        ),
    }  # fmt: skip
    log_training(made["distilled"].directory, lm_weight)
    windows = {
        role: [quality()[role]["loss"] + 0.2 * wobble(n) for n in range(40)]
        for role in ("teacher", "pruned", "distilled")
    }
    detail = {"window_losses": windows, "generations": generations()}
    (made["evaluation"].artifact / "results.json").write_text(json.dumps(detail))
    return made


CONFIG = report.Config(
    "report",
    title="llama_width_prune",
    description="Narrow a Llama-style model and drop layers by importance, then distil",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Input]:
    return make_inputs(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def page(inputs: dict[str, Input], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / report.FILE
    render(CONFIG, inputs, path)
    return path


class Page(HTMLParser):
    """Tags, ids, ``<data>`` values, and text of a page; fails on tags that do not nest."""

    VOID = frozenset({"meta", "br", "rect", "line", "circle", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID or self.get_starttag_text() == f"<{tag}>" and tag not in (
            "meta",
            "br",
        ):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
