"""Writes complete runs with invented results, for tests of code that reads manifests."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nemo_convert.architecture import Architecture
from recipes.core.manifest import ARTIFACT, FileStamp, Manifest, write_manifest
from recipes.core.metrics import METRICS, MetricsLog
from recipes.core.run_state import LastPlan, Request
from recipes.core.stage import Input, StageConfig
from recipes.data.settings import PrepareDataConfig
from recipes.distillation.settings import DistillConfig
from recipes.evaluation.settings import EvaluateConfig
from recipes.pruning.settings import AddLayersConfig, PruneConfig
from recipes.report.page import render
from recipes.report.settings import REPORT_FILE, ReportConfig
from recipes.stages.export_hf import ExportConfig
from recipes.stages.import_hf import ImportConfig
from tests.support.results import (
    DROPPED,
    NASTY,
    RESULTS,
    SOURCE,
    STEPS,
    STUDENT,
    TEACHER,
    TOKENS,
    speed_results,
    wobble,
)

SECONDS = (41.302, 12.877, 208.55, 4123.019, 377.4, 25.2, 3.1, 96.4, 61.7, 18.9, 240, 7.5, 33, 9, 8)
"""Invented durations of the stages, in the order in which ``write_stage`` writes them: six in
``make_inputs``, eight in ``make_optional_inputs``, and one that a test adds."""
CONFIG = ReportConfig(
    "report",
    title="llama_width_prune",
    description="Narrow a Llama-style model and drop layers by importance, then distil",
)
"""Settings of the report in these tests."""


def write_stage(
    root: Path,
    config: StageConfig,
    kind: str,
    files: dict[str, int],
    result: Any,
    shape: Architecture | None = None,
) -> Input:
    """Writes the manifest of a complete stage, and returns the stage as the report's input.

    The fingerprint, code hash, start and memory are invented, but differ between stages.

    Args:
        root: Directory of the run.
        config: Settings of the stage. ``config.stage`` is also the name of its directory.
        kind: Type of the artifact.
        files: Sizes of the artifact's files in bytes, by path. The files are not written.
        result: Result dataclass, which becomes the metrics.
        shape: Architecture of the model in the artifact; ``None`` if it has no model.
    """
    index = len(list(root.iterdir()))  # number of stages that are already written
    directory = root / config.stage
    (directory / ARTIFACT).mkdir(parents=True)
    manifest = Manifest(
        stage=config.stage,
        kind=kind,
        fingerprint=f"{index:x}f3c" * 16,  # 64 hexadecimal digits, like SHA-256
        config=asdict(config),
        code=f"c0de{index:x}" + "ab" * 29 + "c",
        inputs={},
        files={name: FileStamp(size, (f"{size:x}" * 64)[:64], 0) for name, size in files.items()},
        metrics=json.loads(json.dumps(asdict(result))),
        architecture=shape.as_dict() if shape else None,
        parameters=shape.parameters() if shape else None,
        tokenizer_sha256="70ce" * 16 if kind != "eval_results" else None,
        versions={"python": "3.11.9", "torch": "2.9.1", "nemo_toolkit": "2.7.3"},
        git_sha="0123456789abcdef0123456789abcdef01234567-dirty",
        started_at=f"2025-03-04T{10 + index}:20:30+00:00",
        seconds=SECONDS[index],
        peak_rss_bytes=1_234_567_890 + 700_000_000 * index,
    )
    write_manifest(directory, manifest)
    return Input(directory, manifest)


def checkpoint_files(shape: Architecture) -> dict[str, int]:
    """Returns invented sizes in bytes of a float32 NeMo checkpoint's files, by path."""
    return {
        "model.nemo/context/model.yaml": 4321,
        "model.nemo/context/tokenizer.json": 2_104_556,
        "model.nemo/weights/__0_0.distcp": 4 * shape.parameters(),
        "model.nemo/weights/metadata.json": 118,
    }


def make_optional_inputs(root: Path) -> dict[str, Input]:
    """Writes the optional stages into the run of ``make_inputs``.

    Returns:
        The stages, by the name of the report's input.
    """
    stages = {  # input name -> type of the artifact, module of the stage (key of ``RESULTS``)
        "plan": ("plan", "plan"),
        "tasks": ("task_results", "evaluate_tasks"),
        "served": ("served_results", "evaluate_served"),
        "engine": ("engine", "build_engine"),
        "speed": ("speed_results", "measure_speed"),
        "search": ("search_results", "successive_halving"),
        "gguf": ("gguf", "export_gguf"),
    }
    inputs = {
        name: write_stage(root, StageConfig(name), kind, {f"{name}.json": 1234}, RESULTS[module])
        for name, (kind, module) in stages.items()
    }
    config, files = AddLayersConfig("add_layers"), checkpoint_files(STUDENT)
    result = RESULTS["add_layers"]
    inputs["sizes"] = write_stage(root, config, "checkpoint_nemo", files, result, STUDENT)
    return inputs


def generations() -> list[dict[str, str]]:
    """Returns prompts (``prompt``), their original continuations (``text``), and those by role."""
    return [
        {
            "prompt": "The Danube is Europe's second-longest river, which",
            "text": " flows south-east for 2,850 km, through ten countries, into the Black Sea.",
            "teacher": " flows through Germany, Austria, Hungary and Romania to the Black Sea.\n\n",
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


def write_training_log(directory: Path, lm_weight: float) -> None:
    """Writes invented metrics of a training run: losses that fall exponentially, with noise."""
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
            # Warmup over 20 steps, then a cosine from 1e-4 to 1e-5.
            lr=1e-4 * min(step / 20, 0.55 + 0.45 * math.cos(math.pi * step / STEPS)),
            tokens_per_second=1210.4,
            grad_norm=1.1 + 4 * math.exp(-step / 40) + 0.3 * wobble(step + 3),
        )
        if step % 50 == 0:
            log.progress("validate", step, STEPS, val_loss=3.75 + 2.6 * math.exp(-step / 80))


def make_inputs(root: Path, *, lm_weight: float = 0.0) -> dict[str, Input]:
    """Writes a run with the stages that a report needs.

    Returns:
        The stages, by the name of the report's input.
    """
    root.mkdir()
    prune = PruneConfig("prune", drop_layers=list(DROPPED))
    prune.target_hidden_size, prune.target_ffn_hidden_size = 512, 1152
    # Sizes of files in bytes: a token has 2 bytes, a float32 weight 4.
    data = {f"{split}.{suffix}": 2 * n for split, n in TOKENS.items() for suffix in ("bin", "idx")}
    nemo, exported = "checkpoint_nemo", {"model.safetensors": 4 * STUDENT.parameters()}
    teacher = ImportConfig("import_hf", hf_path="some/SmallLM-135M-Instruct")
    distill = DistillConfig("distill", max_steps=STEPS, lm_weight=lm_weight)
    stages: dict[str, tuple[StageConfig, str, dict[str, int], Architecture | None]] = {
        "teacher": (teacher, nemo, checkpoint_files(TEACHER), TEACHER),
        "data": (PrepareDataConfig("prepare_data", sources=[SOURCE]), "dataset", data, None),
        "pruned": (prune, nemo, {**checkpoint_files(STUDENT), "importance.json": 900}, STUDENT),
        "distilled": (distill, nemo, checkpoint_files(STUDENT), STUDENT),
        "evaluation": (EvaluateConfig("evaluate"), "eval_results", {"results.json": 7890}, None),
        "exported": (ExportConfig("export_hf"), "checkpoint_hf", exported, STUDENT),
    }
    inputs = {
        name: write_stage(root, config, kind, files, RESULTS[config.stage], shape)
        for name, (config, kind, files, shape) in stages.items()
    }
    write_training_log(inputs["distilled"].directory, lm_weight)
    losses = {
        role: [model.loss + 0.2 * wobble(n) for n in range(40)]
        for role, model in RESULTS["evaluate"].models().items()
    }
    evaluation_details = {"sequence_losses": losses, "generations": generations()}
    (inputs["evaluation"].artifact / "results.json").write_text(json.dumps(evaluation_details))
    return inputs


def make_run(
    root: Path,
    *,
    loss: float = 3.8125,
    speed: float = 1.0,
    heldout: str | None = None,
    **settings: Any,
) -> Path:
    """Writes a complete run in the launcher's format.

    Args:
        root: Directory of the run.
        loss: The distilled student's loss on held-out text.
        speed: Factor that multiplies the measured decoding speeds.
        heldout: SHA-256 of the held-out text; ``None`` leaves the hash of ``make_inputs``.
        settings: Settings of the distillation that replace those of ``make_inputs``.

    Returns:
        ``root``.
    """
    inputs = {**make_inputs(root), **make_optional_inputs(root)}
    data = inputs["data"].manifest
    if heldout:
        data.files["heldout.bin"] = replace(data.files["heldout.bin"], sha256=heldout)
    evaluation, distilled = inputs["evaluation"].manifest, inputs["distilled"].manifest
    loss_change = loss - evaluation.metrics["distilled"]["loss"]
    evaluation.metrics["distilled"] |= {"loss": loss, "perplexity": math.exp(loss)}
    evaluation.input_content["data"] = data.content_hash()
    inputs["exported"].manifest.inputs["evaluation"] = evaluation.fingerprint
    inputs["speed"].manifest.metrics |= asdict(speed_results(speed))
    distilled.config.update(settings)
    results_file = inputs["evaluation"].artifact / "results.json"
    evaluation_details = json.loads(results_file.read_text())
    # Runs with different losses also get different noise.
    losses = evaluation_details["sequence_losses"]["distilled"]
    evaluation_details["sequence_losses"]["distilled"] = [
        value + loss_change + 0.05 * wobble(n + round(1000 * loss))
        for n, value in enumerate(losses)
    ]
    results_file.write_text(json.dumps(evaluation_details))
    for stage in inputs.values():
        write_manifest(stage.directory, stage.manifest)
        fingerprint, code = stage.manifest.fingerprint, stage.manifest.code
        Request(stage.directory.name, fingerprint, code, {}, {}).write(stage.directory)
    fingerprints = {stage.directory.name: stage.manifest.fingerprint for stage in inputs.values()}
    LastPlan("llama_width_prune", fingerprints).write(root)
    return root


def render_page(inputs: dict[str, Input], folder: Path, cfg: ReportConfig = CONFIG) -> str:
    """Renders a report into a folder and returns its HTML."""
    render(cfg, inputs, folder / REPORT_FILE)
    return (folder / REPORT_FILE).read_text(encoding="utf-8")


def with_result(item: Input, result: Any) -> Input:
    """Returns a copy of an input with another result. The manifest file does not change."""
    return replace(item, manifest=replace(item.manifest, metrics=asdict(result)))
