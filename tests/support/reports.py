"""Runs as their stages would leave them, for what reads manifests: a report, a comparison."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

from nemo_convert.architecture import Architecture
from nemo_convert.results import GgufResult, ImportResult, ParityResult
from recipes.core.manifest import ARTIFACT, FileStamp, Manifest, read_manifest, write_manifest
from recipes.core.metrics import METRICS, MetricsLog
from recipes.core.run_state import LastPlan, Request
from recipes.core.stage import Input, StageConfig
from recipes.core.statistics import Difference
from recipes.data.results import DatasetResult, Origin
from recipes.data.settings import PrepareDataConfig
from recipes.distillation.results import DistillationResult
from recipes.distillation.settings import DistillConfig
from recipes.engines.results import (
    BenchmarkResults,
    BenchmarkRow,
    EngineQuality,
    EngineResult,
    MachineRates,
    Speedup,
    Spread,
)
from recipes.evaluation.results import (
    Differences,
    EvaluationResult,
    ModelQuality,
    Score,
    TaskResult,
    TaskResults,
    TextQuality,
)
from recipes.evaluation.settings import EvaluateConfig
from recipes.planning.results import Cell, PlanResult, Table
from recipes.pruning.results import PruneResult
from recipes.pruning.settings import PruneConfig
from recipes.report.page import render
from recipes.report.settings import REPORT_FILE, ReportConfig
from recipes.search.results import Candidate, SearchResult
from recipes.stages import export_hf, import_hf

if TYPE_CHECKING:
    from pathlib import Path

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
    "plot-work",
    "plot-by-parameters",
)
OPTIONAL_PLOTS = (
    "plot-tasks",
    "plot-speedups",
    "plot-by-size",
    "plot-by-latency",
    "plot-search",
)
SECONDS = (41.302, 12.877, 208.55, 4123.019, 377.4, 25.2, 3.1, 96.4, 61.7, 18.9, 240.2, 7.5)
NASTY = "<script>document.title = 'owned'</script> & <b>bold</b>"


def wobble(step: int) -> float:
    return math.sin(step * 12.9898) * 0.5 + math.sin(step * 4.1414) * 0.5


def quality() -> EvaluationResult:
    def model(*figures: float, shape: Architecture) -> ModelQuality:
        loss, error, kl, agreement = figures
        return ModelQuality(loss, error, math.exp(loss), kl, agreement, shape.parameters())

    return EvaluationResult(
        teacher=model(3.0214, 0.0412, 0.0, 1.0, shape=TEACHER),
        pruned=model(6.8437, 0.0655, 3.9106, 0.1817, shape=STUDENT),
        distilled=model(3.8125, 0.0467, 0.7231, 0.6042, shape=STUDENT),
        sequences=40,
        tokens=10240,
        predictions=10098,
        recovered=0.7930616922,
    )


def task(metric: str, values: tuple[float, float, float], items: int) -> TaskResult:
    teacher, pruned, distilled = values

    def score(value: float) -> Score:
        return Score(value, math.sqrt(value * (1 - value) / items))

    def against(value: float) -> Difference:
        gap, half = value - teacher, 1.2 / math.sqrt(items)
        return Difference(gap, gap - half, gap + half)

    return TaskResult(
        metric=metric,
        items=items,
        teacher=score(teacher),
        pruned=score(pruned),
        distilled=score(distilled),
        differences=Differences(against(distilled), against(pruned)),
        recovered=(distilled - pruned) / (teacher - pruned),
        version="1.0",
        seconds={},
    )


def task_results() -> TaskResults:
    lambada = replace(
        task("perplexity", (0.5, 0.5 / 3, 0.4), 200),
        teacher=Score(31.25, 31.25 / 12),
        pruned=Score(412.5, 412.5 / 12),
        distilled=Score(52.75, 52.75 / 12),
    )
    tasks = {
        "sciq": replace(
            task("acc", (0.845, 0.415, 0.79), 200),
            answers=task("log-likelihood", (0.8, 0.4, 0.7), 200),
        ),
        "arc_easy": task("acc_norm", (0.585, 0.33, 0.515), 200),
        "piqa": task("acc", (0.68, 0.55, 0.645), 200),
        "lambada": lambada,
    }
    return TaskResults(tasks, {}, "lm_eval 0.4.13", "hub")


def speed_results(speed: float = 1.0) -> BenchmarkResults:
    def about(value: float) -> Spread:
        return Spread(value, 0.93 * value, 1.05 * value)

    rows = [
        BenchmarkRow(
            role=role,
            backend=backend,
            precision=precision,
            batch_size=batch,
            prompt_tokens=512,
            new_tokens=128,
            time_to_first_token_ms=about(812.5 * batch / fast / gain),
            decode_tokens_per_second=about(21.75 * fast * gain * speed),
            throughput_tokens_per_second=about(17.25 * fast * gain * batch),
            peak_memory_bytes=901_234_567 + int(1e8 * fast),
            load_seconds=1.75 * fast,
            disk_bytes=int(size * shape.parameters()),
        )
        for backend, precision, gain, size in (
            ("transformers", "fp32", 1.0, 4),
            ("openvino", "fp32", 2.6, 4),
            ("openvino", "int8", 4.1, 1),
        )
        for batch in (1, 4)
        for role, fast, shape in (("teacher", 1.0, TEACHER), ("student", 1.375, STUDENT))
    ]
    speedups = [
        Speedup(
            backend=row.backend,
            precision=row.precision,
            batch_size=row.batch_size,
            prompt_tokens=512,
            prefill=1.375,
            prefill_roofline=1.6125,
            decode=1.375 - 0.0625 * row.batch_size,
            decode_roofline=1.5375,
        )
        for row in rows
        if row.role == "student"
    ]
    rates = {"float32": 2.2e11, "bfloat16": 9.9e11}
    machine = MachineRates("AMD EPYC 9B14", 2, rates, 3.1e10)
    return BenchmarkResults(machine, rows, speedups)


def search_results() -> SearchResult:
    shapes = [(24, 576, 1536), (30, 512, 1152), (28, 512, 1280), (22, 576, 1408)]
    measured = [(41.25, 0.8125), (52.5, 0.9375), (44.75, 0.875), (60.5, 1.25)]
    candidates = [
        Candidate(
            name=f"candidate {number}",
            parameters=113_000_000 - 4_500_000 * number,
            proxy=2.125 + 0.25 * number,
            perplexity=perplexity,
            kl_to_teacher=kl,
            healed=number < 3,
            tokens=20480 if number < 3 else 0,
            chosen=number == 0,
            pareto=number in (0, 1, 2),
            shape=replace(TEACHER, num_layers=n, hidden_size=h, ffn_hidden_size=f),
        )
        for number, ((n, h, f), (perplexity, kl)) in enumerate(zip(shapes, measured, strict=True))
    ]
    return SearchResult(candidates, {"parameters": 113_500_000})


def plan_figures() -> PlanResult:
    rows: list[list[Cell]] = [["prune", 3_100_000_000, True], ["distill", 4_400_000_000, None]]
    table = Table("Memory by stage", ["stage", "peak bytes", "fits"], rows)
    figures: dict[str, Cell] = {"hours": 1.375, "peak_bytes": 4_400_000_000, "fits": True}
    return PlanResult(figures, [table], {"distill": 1331.44})


def engine_figures() -> EngineResult:
    text = TextQuality(3.8203, 0.0469, 45.625, 0.0078, 0.9531)
    return EngineResult(
        backend="openvino",
        precision="int8",
        group_size=None,
        build_seconds=47.25,
        bytes=101_222_333,
        max_logit_difference=0.03125,
        greedy_margin=0.015625,
        weight_types={"u8": 86_000_000, "f32": 1152},
        quality=EngineQuality(text, replace(text, kl_to_teacher=0.0), 8, 2048, 2040),
    )


def optional_inputs(root: Path) -> dict[str, Input]:
    """What the optional stages leave, in the same run as ``make_inputs``."""
    results = {
        "plan": ("plan", plan_figures()),
        "tasks": ("task_results", task_results()),
        "engine": ("engine", engine_figures()),
        "speed": ("speed_results", speed_results()),
        "search": ("search_results", search_results()),
        "gguf": ("gguf", GgufResult("llama", "f16", 219, 231_000_111)),
    }
    return {
        name: stage(root, StageConfig(name), kind, {f"{name}.json": 1234}, result)
        for name, (kind, result) in results.items()
    }


def generations() -> list[dict[str, str]]:
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


def stage(
    root: Path,
    config: StageConfig,
    kind: str,
    files: dict[str, int],
    result: Any,
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
        files={name: FileStamp(size, (f"{size:x}" * 64)[:64], 0) for name, size in files.items()},
        metrics=asdict(result),
        architecture=shape.as_dict() if shape else None,
        parameters=shape.parameters() if shape else None,
        tokenizer_sha256="70ce" * 16 if kind != "eval_results" else None,
        versions={"python": "3.11.9", "torch": "2.9.1", "nemo_toolkit": "2.7.3"},
        git_sha="0123456789abcdef0123456789abcdef01234567-dirty",
        started_at=f"2025-03-04T{10 + number}:20:30+00:00",
        seconds=SECONDS[number],
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
    importance = {n: 0.07 + 0.3 / n + 0.02 * wobble(n) for n in range(1, LAYERS + 1)}
    kept = [n for n in range(1, LAYERS + 1) if n not in DROPPED]
    parts = {"train": 812_345, "validation": 17_001, "calibration": 34_567, "heldout": 33_210}
    documents = {part: tokens // 90 for part, tokens in parts.items()}
    source = "hf://some/corpus@en:train"
    made = {
        "teacher": stage(
            root,
            import_hf.ImportConfig("import_hf", hf_path="some/SmallLM-135M-Instruct"),
            "checkpoint_nemo",
            checkpoint(TEACHER),
            ImportResult(0.00011444091796875, 128, "apache-2.0"),
            TEACHER,
        ),
        "data": stage(
            root,
            PrepareDataConfig("prepare_data", sources=[source]),
            "dataset",
            {f"{part}.{end}": 2 * count for part, count in parts.items() for end in ("bin", "idx")},
            DatasetResult(documents, parts, [source], {}, 0, origins={source: Origin("CC-BY-4.0")}),
        ),
        "pruned": stage(
            root,
            PruneConfig(
                "prune", drop_layers=list(DROPPED), target_hidden_size=512,
                target_ffn_hidden_size=1152,
            ),
            "checkpoint_nemo",
            {**checkpoint(STUDENT), "importance.json": 900},
            PruneResult(
                kept_layers=kept,
                layer_importance=importance,
                layer_measure="block_influence",
                calibration_tokens=16384,
                calibration_sequences=64,
                teacher_parameters=TEACHER.parameters(),
            ),
            STUDENT,
        ),
        "distilled": stage(
            root,
            DistillConfig("distill", max_steps=STEPS, lm_weight=lm_weight),
            "checkpoint_nemo",
            checkpoint(STUDENT),
            DistillationResult(
                final_loss=0.72,
                final_kd=0.72,
                final_hidden=None,
                final_lm=None,
                val_loss=3.77,
                steps=STEPS,
                skipped_steps=0,
                tokens=STEPS * 1024,
                tokens_per_second=1210.4,
                teacher_loss=3.02,
            ),
            STUDENT,
        ),
        "evaluation": stage(
            root,
            EvaluateConfig("evaluate"),
            "eval_results",
            {"results.json": 7890},
            quality(),
        ),
        "exported": stage(
            root,
            export_hf.ExportConfig("export_hf"),
            "checkpoint_hf",
            {"model.safetensors": 4 * STUDENT.parameters(), "config.json": 715},
            ParityResult(9.1552734375e-05, 128),
            STUDENT,
        ),
    }  # fmt: skip
    log_training(made["distilled"].directory, lm_weight)
    sequences = {
        role: [model.loss + 0.2 * wobble(n) for n in range(40)]
        for role, model in quality().models().items()
    }
    detail = {"sequence_losses": sequences, "generations": generations()}
    (made["evaluation"].artifact / "results.json").write_text(json.dumps(detail))
    return made


def make_run(
    root: Path,
    *,
    loss: float = 3.8125,
    speed: float = 1.0,
    heldout: str | None = None,
    **settings: Any,
) -> Path:
    """A complete run as the launcher leaves it; ``settings`` are of its distillation."""
    inputs = {**make_inputs(root), **optional_inputs(root)}
    data = inputs["data"].manifest
    if heldout:
        data.files["heldout.bin"] = replace(data.files["heldout.bin"], sha256=heldout)
    evaluation, distilled = inputs["evaluation"].manifest, inputs["distilled"].manifest
    shift = loss - evaluation.metrics["distilled"]["loss"]
    evaluation.metrics["distilled"] |= {"loss": loss, "perplexity": math.exp(loss)}
    evaluation.input_content["data"] = data.content()
    inputs["exported"].manifest.inputs["evaluation"] = evaluation.fingerprint
    inputs["speed"].manifest.metrics |= asdict(speed_results(speed))
    distilled.config.update(settings)
    results = inputs["evaluation"].artifact / "results.json"
    detail = json.loads(results.read_text())
    losses = detail["sequence_losses"]["distilled"]
    detail["sequence_losses"]["distilled"] = [
        value + shift + 0.05 * wobble(n + round(1000 * loss)) for n, value in enumerate(losses)
    ]
    results.write_text(json.dumps(detail))
    for item in inputs.values():
        write_manifest(item.directory, item.manifest)
        made = item.manifest
        Request(item.directory.name, made.fingerprint, made.code, {}, {}).write(item.directory)
    stages = {item.directory.name: item.manifest.fingerprint for item in inputs.values()}
    LastPlan("llama_width_prune", stages).write(root)
    return root


CONFIG = ReportConfig(
    "report",
    title="llama_width_prune",
    description="Narrow a Llama-style model and drop layers by importance, then distil",
)


class Page(HTMLParser):
    """Tags, ``<data>`` values and text of a page; fails on tags that do not nest."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.tags if name in attrs]

    def figures(self) -> set[float]:
        return {float(attrs["value"]) for tag, attrs in self.tags if tag == "data"}


def every_number(value: Any) -> set[float]:
    """Numbers anywhere in nested data, without truth values."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return {n for v in value for n in every_number(v)}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {float(value)} if is_number else set()


def section(text: str, name: str) -> str:
    """One section of a page."""
    return text[text.index(f'<section id="{name}">') :].partition("</section>")[0] + "</section>"


def rendered(inputs: dict[str, Input], folder: Path, cfg: ReportConfig = CONFIG) -> str:
    render(cfg, inputs, folder / REPORT_FILE)
    return (folder / REPORT_FILE).read_text(encoding="utf-8")


def changed(item: Input, result: Any) -> Input:
    return replace(item, manifest=replace(item.manifest, metrics=asdict(result)))
