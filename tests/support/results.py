"""Invented results of stages, for tests of code that reads results."""

from __future__ import annotations

import math
from dataclasses import replace

from nemo_convert.architecture import Architecture
from nemo_convert.hf_config import read_architecture
from nemo_convert.results import GgufResult, ImportResult, ParityResult
from nemo_convert.smollm2 import HF_CONFIG
from recipes.core.statistics import Difference
from recipes.data.results import DatasetResult, Origin, SourceTokens, TrainedSource
from recipes.distillation.results import DistillationResult
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
    AddLayersResult,
    Differences,
    EvaluationResult,
    ModelQuality,
    Score,
    ServedResult,
    ServedScores,
    ServedTask,
    ServedText,
    SizeQuality,
    TaskResult,
    TaskResults,
    TextQuality,
)
from recipes.planning.results import Cell, PlanResult, Table
from recipes.pruning.results import HealResult, PruneResult
from recipes.search.results import Candidate, SearchResult

LAYERS, DROPPED = 30, (9, 12, 13, 17, 20, 21)
"""Number of the teacher's layers, and numbers (from 1) of the layers that pruning removes."""
KEPT = [n for n in range(1, LAYERS + 1) if n not in DROPPED]
TEACHER = read_architecture(HF_CONFIG, "smollm2")
STUDENT = replace(TEACHER, num_layers=len(KEPT), hidden_size=512, ffn_hidden_size=1152)
STEPS = 400
"""Training steps of the distillation, with 1024 tokens each."""
SOURCE = "hf://some/corpus@en:train"
TOKENS = {"train": 812_345, "validation": 17_001, "calibration": 34_567, "heldout": 33_210}
"""Number of tokens in each split of the data."""
NASTY = "<script>document.title = 'owned'</script> & <b>bold</b>"
"""Text that a report must escape."""


def wobble(step: int) -> float:
    """Returns noise from -1 to 1, always the same value for a step."""
    return math.sin(step * 12.9898) * 0.5 + math.sin(step * 4.1414) * 0.5


def evaluation_result() -> EvaluationResult:
    """Returns a result in which distillation recovers 79% of the loss that pruning added."""

    def model(
        loss: float, standard_error: float, kl: float, agreement: float, *, shape: Architecture
    ) -> ModelQuality:
        perplexity = math.exp(loss)
        return ModelQuality(loss, standard_error, perplexity, kl, agreement, shape.parameters())

    return EvaluationResult(
        teacher=model(3.0214, 0.0412, 0.0, 1.0, shape=TEACHER),
        pruned=model(6.8437, 0.0655, 3.9106, 0.1817, shape=STUDENT),
        distilled=model(3.8125, 0.0467, 0.7231, 0.6042, shape=STUDENT),
        sequences=40,
        tokens=10240,
        predictions=10098,
        recovered=0.7930616922,  # (6.8437 - 3.8125) / (6.8437 - 3.0214)
    )


def added_layers_result() -> AddLayersResult:
    """Returns a result that adds the first two dropped layers to the student.

    ``sizes`` has the quality for every number of added layers, from 0 to one less than all.
    """
    sizes = {}
    for count in range(len(DROPPED)):
        quality = TextQuality(3.68 - 0.03 * count, 0.05, 39.8 - count, 0.21 - 0.03 * count, 0.7)
        sizes[len(KEPT) + count] = SizeQuality(
            **vars(quality),
            parameters=85_000_000 + 3_540_000 * count,
            sources={"wikipedia": quality, NASTY: quality},
        )
    return AddLayersResult(
        kept_layers=sorted([*KEPT, *DROPPED[:2]]),
        added_layers=list(DROPPED[:2]),
        sizes=sizes,
        teacher_layers=LAYERS,
        teacher_parameters=TEACHER.parameters(),
        tokens=10_240,
    )


def task(metric: str, values: tuple[float, float, float], items: int) -> TaskResult:
    """Returns the result of one benchmark with these mean scores of the three models."""
    teacher, pruned, distilled = values

    def score(value: float) -> Score:
        return Score(value, math.sqrt(value * (1 - value) / items))

    def from_teacher(value: float) -> Difference:
        gap, half_width = value - teacher, 1.2 / math.sqrt(items)  # an invented interval
        return Difference(gap, gap - half_width, gap + half_width)

    return TaskResult(
        metric=metric,
        items=items,
        teacher=score(teacher),
        pruned=score(pruned),
        distilled=score(distilled),
        differences=Differences(from_teacher(distilled), from_teacher(pruned)),
        recovered=(distilled - pruned) / (teacher - pruned),
        version="1.0",
        split="validation",
        num_fewshot=0,
        data="hub",
        seconds={},
    )


def task_results() -> TaskResults:
    """Returns results of four benchmarks: three with accuracies, one with perplexities."""
    # The fractions only set ``differences`` and ``recovered``. Perplexities replace the scores.
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
    return TaskResults(tasks, {}, "lm_eval 0.4.13")


def speed_results(speed: float = 1.0) -> BenchmarkResults:
    """Returns results of both models in three engines, with batch sizes 1 and 4.

    Args:
        speed: Factor that multiplies the decoding speeds.
    """

    def spread_around(value: float) -> Spread:
        return Spread(value, 0.93 * value, 1.05 * value)

    rows = [
        BenchmarkRow(
            role=role,
            backend=backend,
            precision=precision,
            batch_size=batch,
            prompt_tokens=512,
            new_tokens=128,
            time_to_first_token_ms=spread_around(812.5 * batch / role_speed / backend_speed),
            decode_tokens_per_second=spread_around(21.75 * role_speed * backend_speed * speed),
            throughput_tokens_per_second=spread_around(17.25 * role_speed * backend_speed * batch),
            peak_memory_bytes=901_234_567 + int(1e8 * role_speed),
            load_seconds=1.75 * role_speed,
            disk_bytes=int(weight_bytes * shape.parameters()),
        )
        for backend, precision, backend_speed, weight_bytes in (
            ("transformers", "fp32", 1.0, 4),
            ("openvino", "fp32", 2.6, 4),
            ("openvino", "int8", 4.1, 1),
        )
        for batch in (1, 4)
        for role, role_speed, shape in (("teacher", 1.0, TEACHER), ("student", 1.375, STUDENT))
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


def search_result() -> SearchResult:
    """Returns four candidates. The first is chosen; only the last is neither healed nor trained."""
    # Layers, hidden size and FFN size of each candidate; its perplexity and KL to the teacher.
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
            shape=replace(TEACHER, num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn),
        )
        for number, ((layers, hidden, ffn), (perplexity, kl)) in enumerate(
            zip(shapes, measured, strict=True)
        )
    ]
    return SearchResult(candidates, {"parameters": 113_500_000})


def plan_result() -> PlanResult:
    """Returns a plan with cells of all types: text, integers, floats, Booleans and ``None``."""
    rows: list[list[Cell]] = [["prune", 3_100_000_000, True], ["distill", 4_400_000_000, None]]
    table = Table("Memory by stage", ["stage", "peak bytes", "fits"], rows)
    summary: dict[str, Cell] = {"hardware": "cpu", "device-hours": 1.375, "dollars": 1}
    seconds = {"score": 90.0, "distill": 390.0, "evaluate": 40.0}
    return PlanResult(summary, [table], tokens_per_second={"distill": 1331.44}, seconds=seconds)


def engine_result() -> EngineResult:
    """Returns the result of an int8 OpenVINO engine, compared with its source model."""
    engine = TextQuality(
        loss=3.8203,
        loss_standard_error=0.0469,
        perplexity=45.625,
        kl_to_teacher=0.0078,
        top1_agreement=0.9531,
    )
    return EngineResult(
        backend="openvino",
        precision="int8",
        build_seconds=47.25,
        bytes=101_222_333,
        max_logit_difference=0.03125,
        greedy_margin=0.015625,
        weight_types={"u8": 86_000_000, "f32": 1152},
        quality=EngineQuality(
            engine=engine,
            source=replace(engine, kl_to_teacher=0.0),
            sequences=8,
            tokens=2048,
            predictions=2040,  # of each sequence all tokens but the first
            loss_difference=Difference(0.0117, 0.0039, 0.0195),
        ),
    )


def served_result() -> ServedResult:
    """Returns the result of a GGUF file in llama.cpp, in one benchmark and on held-out text."""
    sciq = ServedTask(
        "acc",
        items=64,
        student=Score(0.5, 0.0625),
        served=Score(0.4375, 0.03125),
        difference=Difference(-0.0625, -0.125, 0.015625),
        answers=ServedScores(
            "log-likelihood",
            items=64,
            student=Score(-3.25, 0.25),
            served=Score(-3.375, 0.5),
            difference=Difference(-0.125, -0.25, -0.0078),
        ),
    )
    text = ServedText(
        student_perplexity=45.25,
        served_perplexity=46.75,
        loss_difference=Difference(0.0326, 0.0215, 0.0437),  # log(46.75 / 45.25) = 0.0326
        sequences=8,
        predictions=2040,
    )
    return ServedResult(
        "llama_cpp", "q8_0", {"sciq": sciq}, text, harness="lm_eval", data="a wheel"
    )


RESULTS = {
    "import_hf": ImportResult(0.00011444091796875, 128, "apache-2.0"),
    "prepare_data": DatasetResult(
        documents={split: tokens // 90 for split, tokens in TOKENS.items()},
        tokens=TOKENS,
        sources=[SOURCE],
        source_tokens={split: [SourceTokens("text", n)] for split, n in TOKENS.items()},
        document_end=0,
        origins={SOURCE: Origin("CC-BY-4.0")},
    ),
    "prune": PruneResult(
        kept_layers=KEPT,
        layer_importance={n: 0.07 + 0.3 / n + 0.02 * wobble(n) for n in range(1, LAYERS + 1)},
        layer_measure="block_influence",
        calibration_tokens=16384,
        calibration_sequences=64,
        teacher_parameters=TEACHER.parameters(),
    ),
    "heal": HealResult([1], calibration_tokens=64, kl_pruned=0.68, kl_healed=0.4154),
    "distill": DistillationResult(
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
        sources=[TrainedSource("text", STEPS * 1024, 4.5)],
        kept_layers=KEPT,
    ),
    "add_layers": added_layers_result(),
    "evaluate": evaluation_result(),
    "evaluate_tasks": task_results(),
    "export_hf": ParityResult(9.1552734375e-05, 128),
    "export_gguf": GgufResult("llama", "f16", 219, 231_000_111),
    "build_engine": engine_result(),
    "evaluate_served": served_result(),
    "measure_speed": speed_results(),
    "plan": plan_result(),
    "successive_halving": search_result(),
}
"""Maps the name of a stage's module to an invented result of the stage."""
