"""Tests the report's sections of optional stages, and its section on the cost of a run."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from recipes.core.stage import Input, StageConfig
from recipes.core.statistics import Difference, margin95
from recipes.distillation.results import CacheResult, DistillationResult
from recipes.distillation.settings import CacheLogitsConfig
from recipes.evaluation.results import Differences, SourceQuality
from recipes.planning.inference_cost import ABLATED_FRACTION
from recipes.planning.results import PlanResult
from recipes.planning.transformer import forward_flops
from recipes.pruning.results import ScoreResult
from recipes.pruning.settings import HealConfig, ScoreConfig
from recipes.report.plots import Mark, trade_off_plot
from recipes.report.sections import PARAMETERS, PERPLEXITY
from recipes.search.space import SEARCH_AXES
from recipes.stages import report
from tests.support.manifests import edit_manifest
from tests.support.pages import (
    OPTIONAL_PLOTS,
    Page,
    all_numbers,
    render_with,
    section,
    table,
)
from tests.support.reports import (
    CONFIG,
    make_inputs,
    make_optional_inputs,
    render_page,
    with_result,
    write_stage,
)
from tests.support.results import LAYERS, NASTY, RESULTS, STEPS, STUDENT, TEACHER

if TYPE_CHECKING:
    from pathlib import Path

OPTIONAL_INPUTS = [n for n in report.STAGE.optional_inputs if n not in report.DISTILLATION]
"""Inputs that a report of a distillation may lack. Each has a section, whose id is its name."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Input]:
    """The inputs of a report, by name, of a run with every optional stage."""
    run = tmp_path_factory.mktemp("full") / "run"
    return {**make_inputs(run, lm_weight=0.2), **make_optional_inputs(run)}


@pytest.fixture(scope="module")
def text(inputs: dict[str, Input], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of ``inputs`` as HTML."""
    return render_page(inputs, tmp_path_factory.mktemp("page"))


def test_names_are_escaped(inputs: dict[str, Input], tmp_path: Path) -> None:
    """Plants HTML in names of text sources, tasks, models, files, processors and libraries."""
    hostile_inputs = deepcopy(inputs)
    metrics = {name: item.manifest.metrics for name, item in hostile_inputs.items()}
    metrics["data"]["sources"] = [NASTY]
    fields = ("teacher", "pruned", "distilled", "sequences", "tokens", "predictions", "recovered")
    source_quality = {name: metrics["evaluation"][name] for name in fields}
    metrics["evaluation"]["sources"] = {NASTY: source_quality}
    tasks = metrics["tasks"]["tasks"].values()
    metrics["tasks"]["tasks"] = {f"{NASTY}{n}": {**t, "metric": NASTY} for n, t in enumerate(tasks)}
    metrics["speed"]["machine"]["cpu"] = NASTY
    for item in hostile_inputs.values():
        manifest = item.manifest
        manifest.versions[NASTY] = NASTY
        manifest.files[NASTY] = next(iter(manifest.files.values()))
        manifest.config |= dict.fromkeys(("hf_path", "teacher", "recipe"), NASTY)
    text = render_page(hostile_inputs, tmp_path)
    assert Page(text).text.count(NASTY) > 20  # shown as text, not read as tags
    assert "<script" not in text
    assert "<b>bold" not in text


def shown_numbers_of_sizes(result: dict[str, Any]) -> list[Any]:
    """Returns the numbers of an ``AddLayersResult``, given as a dict, that a report shows.

    Layer numbers and layer counts are left out, since the report shows them as text.
    """
    names = ("loss", "loss_standard_error", "perplexity", "kl_to_teacher", "parameters")
    return [
        result["tokens"],
        *([size[name] for name in names] for size in result["sizes"].values()),
        # The perplexity on each source of text, at each size.
        *(s["perplexity"] for size in result["sizes"].values() for s in size["sources"].values()),
    ]


def test_sections_have_all_numbers_of_their_stages(inputs: dict[str, Input], text: str) -> None:
    # ``metrics`` becomes what the report should show: some numbers are removed, others converted.
    metrics = {name: deepcopy(inputs[name].manifest.metrics) for name in OPTIONAL_INPUTS}
    for candidate in metrics["search"]["candidates"]:  # only axes that differ are shown
        candidate["shape"] = {axis: candidate["shape"][axis] for axis in SEARCH_AXES[:3]}
    for task in metrics["tasks"]["tasks"].values():
        del task["version"], task["differences"]["pruned"]
        for role in ("teacher", "pruned", "distilled"):
            # Shown as the half-width of the 95% interval.
            task[role]["standard_error"] = margin95(task[role]["standard_error"], task["items"])
            # ``answers`` has the log-likelihoods of the correct answers. Their table has intervals
            # only for differences.
            if task["answers"]:
                del task["answers"][role]["standard_error"]
    for task in metrics["served"]["tasks"].values():
        for scores in (task, task["answers"]):
            for role in ("student", "served"):
                error = scores[role]["standard_error"]
                scores[role]["standard_error"] = margin95(error, scores["items"])
    metrics["sizes"] = shown_numbers_of_sizes(metrics["sizes"])
    del metrics["plan"]["seconds"]  # shown in other units
    page = Page(text)
    assert all_numbers(metrics) <= page.numbers()
    assert set(OPTIONAL_PLOTS) <= set(page.values("id"))


@pytest.mark.parametrize("name", OPTIONAL_INPUTS)
def test_a_section_appears_with_its_input(
    inputs: dict[str, Input], tmp_path: Path, name: str
) -> None:
    required = {key: item for key, item in inputs.items() if key not in OPTIONAL_INPUTS}
    ids = set(Page(render_page({**required, name: inputs[name]}, tmp_path)).values("id"))
    assert {*OPTIONAL_INPUTS} & ids == {name}
    ids_without_optional_inputs = set(Page(render_page(required, tmp_path)).values("id"))
    assert not {*OPTIONAL_PLOTS} & ids_without_optional_inputs


def test_a_search_without_training_has_a_report(inputs: dict[str, Input], tmp_path: Path) -> None:
    page = Page(render_page({name: inputs[name] for name in ("teacher", "search")}, tmp_path))
    links = {link.removeprefix("#") for link in page.values("href")}
    assert links == {"search", "cost", "provenance"}
    assert "candidate 0 was chosen" in page.text


def test_the_plan_is_compared_with_the_run(text: str) -> None:
    # The measured tokens/s, and by how many percent the planned tokens/s exceed them.
    assert {1210.4, 100 * (1331.44 / 1210.4 - 1)} <= Page(section(text, "plan")).numbers()


def test_a_second_phase_has_its_own_plan_and_adds_its_tokens(tmp_path: Path) -> None:
    """The stage ``distill_long`` trains the student of ``distill`` further on long sequences."""
    run = tmp_path / "run"
    inputs = {**make_inputs(run), **make_optional_inputs(run)}
    first = inputs["distilled"]
    result = first.manifest.result(DistillationResult)
    second = with_result(first, replace(result, tokens=500_000_000, tokens_per_second=150.0))
    manifest = replace(
        second.manifest, fingerprint="2" * 64, inputs={"student": first.manifest.fingerprint}
    )
    second = Input(run / "distill_long", manifest)
    healed = write_stage(
        run, HealConfig("heal"), "checkpoint_nemo", {"a": 1}, RESULTS["heal"], STUDENT
    )
    edit_manifest(first.directory, inputs={"student": healed.manifest.fingerprint})
    plan = replace(RESULTS["plan"], tokens_per_second={"distill": 1650.0, "distill_long": 160.0})
    sciq = RESULTS["evaluate_tasks"].tasks["sciq"]
    # The benchmark was also evaluated halfway through the second phase.
    tasks = {"sciq": replace(sciq, steps={STEPS // 2: replace(sciq.pruned, value=0.625)})}
    changed = {
        "distilled": second,
        "plan": with_result(inputs["plan"], plan),
        "tasks": with_result(inputs["tasks"], replace(RESULTS["evaluate_tasks"], tasks=tasks)),
    }
    text = render_page({**inputs, **changed}, tmp_path)
    # The curve of scores starts at the pruned model, before both phases. The first phase has
    # 409,600 tokens, and half of the second has 250 million.
    plots = section(text, "tasks")
    for tokens, score in (("0", "0.415"), ("250.4 M", "0.625")):
        assert f"tokens {tokens}: student {score}" in plots
    # The planned and the measured tokens/s of ``distill_long``.
    assert {160.0, 150.0} <= Page(section(text, "plan")).numbers()
    summary = text.partition('<p class="summary">')[2].partition("</p>")[0]
    assert result.tokens + 500_000_000 in Page(summary).numbers()
    assert {0.68, 0.4154} <= Page(summary).numbers()  # KL before and after healing


def test_the_precision_of_the_teacher_is_named_if_the_student_is_quantized(
    inputs: dict[str, Input], text: str, tmp_path: Path
) -> None:
    results = RESULTS["measure_speed"]
    rows = [
        replace(row, backend="tensorrt_llm", precision="bf16" if row.role == "teacher" else "fp8")
        for row in results.rows
    ]
    speedup = replace(results.speedups[-1], backend="tensorrt_llm", precision="fp8")
    changed = replace(results, rows=rows, speedups=[replace(speedup, prefill_roofline=None)])
    page = render_with(inputs, tmp_path, speed=changed)
    for element_id in ('id="kpi-speed"', 'id="plot-speedups"'):  # a card, and a table's first cell
        element = page.partition(element_id)[2].partition("</td>")[0].partition("</div>")[0]
        assert "bf16" in element
    assert "same engine" in text  # in ``inputs``, teacher and student have the same precision
    assert "same engine" not in page


def test_significant_difference_is_marked(inputs: dict[str, Input], tmp_path: Path) -> None:
    """The 95% interval of the planted difference of -0.2 does not include 0."""
    results = RESULTS["evaluate_tasks"]
    worse = Differences(distilled=Difference(-0.2, -0.3, -0.1), pruned=Difference(-0.4, -0.5, -0.3))
    tasks = {name: replace(task, differences=worse) for name, task in results.tasks.items()}
    text = render_with(inputs, tmp_path, tasks=replace(results, tasks=tasks))
    assert '<span class="worse"><data value="-0.2" title="-0.2">−20.0</data></span>' in text
    # Fractions are shown in percent. Other scores are not marked, since lower may be better: the
    # metric of the task ``lambada`` is perplexity.
    assert '<span class="even"><data value="-0.2" title="-0.2">−0.20</data></span>' in text


def test_gates_are_shown_with_the_measured_values(inputs: dict[str, Input], tmp_path: Path) -> None:
    """A gate is left out if no input has its value, such as ``speedup`` without ``speed``."""
    gates = ["recovered.sciq >= 0.85", "recovered.piqa >= 0.95", "speedup.decode > 1"]
    without_speed = {name: item for name, item in inputs.items() if name != "speed"}
    text = render_page(without_speed, tmp_path, replace(CONFIG, gates=gates))
    gates_table = table(text, "gates")
    # The words of each row, without tags. The first two pieces are the start and the header row.
    rows = [re.sub(r"<[^>]*>", " ", row).split() for row in gates_table.split("<tr>")[2:]]
    assert [(row[0], row[-1]) for row in rows] == [
        ("recovered.sciq", "passed"),
        ("recovered.piqa", "failed"),
    ]
    measured = inputs["tasks"].manifest.metrics["tasks"]["piqa"]["recovered"]
    assert measured in Page(gates_table).numbers()
    assert 'id="gates"' not in render_page(inputs, tmp_path)  # ``CONFIG`` has no gates


def test_quality_is_shown_by_data_source(inputs: dict[str, Input], tmp_path: Path) -> None:
    engine = RESULTS["build_engine"].quality.engine
    model = replace(engine, perplexity=20.625, kl_to_teacher=0.375)
    quality = SourceQuality(
        model, model, model, sequences=20, tokens=5120, predictions=5100, recovered=None
    )
    evaluation = replace(RESULTS["evaluate"], sources={"a web crawl": quality})
    page = Page(render_with(inputs, tmp_path, evaluation=evaluation))
    assert {20.625, 0.375} <= page.numbers()
    assert "a web crawl" in page.text


def test_models_evaluated_on_one_sequence_have_no_interval(
    inputs: dict[str, Input], tmp_path: Path
) -> None:
    changed = deepcopy(inputs)
    for role in ("teacher", "pruned", "distilled"):
        changed["evaluation"].manifest.metrics[role]["loss_standard_error"] = None
    text = render_page(changed, tmp_path)
    assert not re.search(r"± *(<data|\d|inf)", table(text, "quality"))
    assert re.search(r"± *(<data|\d)", render_page(inputs, tmp_path))  # with standard errors
    plot = text[text.index('id="plot-quality"') :].partition("</svg>")[0]
    positions = re.findall(r' (?:x1|x2|cx)="(.*?)%?"', plot)
    assert positions  # percent of the plot's width
    assert all(0 <= float(position) <= 100 for position in positions)


@pytest.mark.parametrize(
    ("loss", "error"),
    [(math.nan, math.nan), (math.inf, math.nan), (3.8, 300.0), (3.8, 1e9), (705.0, 0.1)],
)
def test_a_failed_training_has_a_report(
    inputs: dict[str, Input], tmp_path: Path, loss: float, error: float
) -> None:
    """After a failed training, the loss or its standard error may be NaN, infinite or huge."""
    perplexity = math.exp(loss) if loss < 709 else loss  # exp(710) exceeds the range of a float
    result = RESULTS["evaluate"]
    distilled = replace(
        result.distilled, loss=loss, loss_standard_error=error, perplexity=perplexity
    )
    page = Page(render_with(inputs, tmp_path, evaluation=replace(result, distilled=distilled)))
    positions = [v for name in ("cx", "x1", "x2", "y1", "y2") for v in page.values(name)]
    assert positions
    assert not [position for position in positions if re.search("nan|inf", position)]


def test_a_plot_without_finite_values_is_empty() -> None:
    marks = [Mark("a", "distilled", 1e6, math.nan), Mark("b", "distilled", math.inf, 3.0)]
    assert "<circle" not in trade_off_plot("plot", marks, PARAMETERS, PERPLEXITY)


def test_every_label_is_drawn_once() -> None:
    """A mark that is close to an earlier label adds its own label to that one.

    ``b`` is close to ``a``. ``c`` is close to ``b`` only, which shows no label.
    """
    marks = [
        Mark(name, "distilled", x, 3.0) for name, x in (("a", 1e8), ("b", 1.03e8), ("c", 1.06e8))
    ]
    marks.append(Mark("d", "distilled", 2e8, 4.0))
    plot = trade_off_plot("plot", marks, PARAMETERS, PERPLEXITY)
    assert re.findall(r'class="mark"[^>]*>([^<]+)</text>', plot) == ["a, b", "c", "d"]


def test_only_the_best_of_many_candidates_have_labels_in_the_plot(
    inputs: dict[str, Input], tmp_path: Path
) -> None:
    search = RESULTS["successive_halving"]
    beaten = replace(search.candidates[1], pareto=False)
    # With four other candidates, these nine are more than ``MAX_LABELS`` of ``sections``.
    more = [
        replace(beaten, name=f"beaten {n}", parameters=110_000_000 + 100_000 * n) for n in range(9)
    ]
    result = replace(search, candidates=[*search.candidates, *more])
    text = render_with(inputs, tmp_path, search=result)
    plot = text[text.index('id="plot-search"') :].partition('id="table-search"')[0]
    labels = " ".join(re.findall(r'class="mark"[^>]*>([^<]*)</text>', plot))
    assert "candidate 0" in labels
    assert "beaten" not in labels
    assert plot.count("<circle") == len(search.candidates) + len(more)
    # Candidates 0 and 2 are on the front. Candidate 3 is the smallest, but was not trained.
    assert plot.count("on the Pareto front") == 2


def test_flops_of_training_and_evaluation(text: str) -> None:
    """A training step runs the teacher's forward pass and the student's forward and backward pass.

    The backward pass takes twice the FLOPs of the forward pass.
    """
    tokens = STEPS * 1024  # each step has 4 sequences of 256 tokens
    teacher, student = (forward_flops(shape, 256) for shape in (TEACHER, STUDENT))  # per token
    total = tokens * (teacher + 3 * student)
    seconds = tokens / 1210.4  # measured tokens/s
    numbers = Page(text).numbers()
    assert {tokens * teacher, 3 * tokens * student, total, total / seconds} <= numbers
    # The evaluation reads 10240 tokens with the teacher and two models of the student's shape.
    assert 10240 * (teacher + 2 * student) in numbers


def test_flops_of_scoring_include_those_of_ablations(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "run")
    config = ScoreConfig("score", num_loss_samples=8, block_sizes=[4])
    result = ScoreResult(
        calibration="text",
        calibration_sequences=64,
        calibration_tokens=64 * 256,
        teacher_loss=3.0,
        layer_importance={},
        loss_predictions=2040,
    )
    score = write_stage(tmp_path / "run", config, "importance", {"a": 5}, result)
    inputs["pruned"].manifest.inputs["importance"] = score.manifest.fingerprint
    ablations = LAYERS + (LAYERS - 3)  # single layers, and blocks of four
    # Forward passes of one sequence of 256 tokens: 64 for calibration, and 8 for each ablation.
    passes = 64 + 8 * ABLATED_FRACTION * ablations
    flops = passes * 256 * forward_flops(TEACHER, 256)
    numbers = Page(render_page(inputs, tmp_path)).numbers()
    assert any(n == pytest.approx(flops) for n in numbers)


def test_flops_of_a_cached_teacher_are_those_of_cache_logits(tmp_path: Path) -> None:
    """``cache_logits`` is not an input of the report; the run directory has its manifest."""
    run = tmp_path / "run"
    inputs = make_inputs(run)
    config = CacheLogitsConfig("cache_logits")
    result = CacheResult(
        sequences=3036,
        sequences_of_text=4000,
        tokens=777_216,
        bytes_per_token=258,
        teacher_loss=3.02,
        tail_mass=0.01,
    )
    cache = write_stage(run, config, "logit_cache", {"a": 5}, result)
    write_stage(run, StageConfig("unrelated"), "plan", {"b": 6}, PlanResult({}, []))
    inputs["distilled"].manifest.inputs["teacher"] = cache.manifest.fingerprint
    page = Page(render_page(inputs, tmp_path))
    assert 777_216 * forward_flops(TEACHER, 256) in page.numbers()
    # The FLOPs of a teacher that runs in every training step.
    assert STEPS * 1024 * forward_flops(TEACHER, 256) not in page.numbers()
    assert cache.manifest.seconds in page.numbers()
    assert "cache_logits" in page.text
    assert "unrelated" not in page.text


def test_training_without_a_kd_loss_has_no_flops_of_the_teacher(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "run")
    inputs["distilled"].manifest.config["kd_weight"] = 0.0
    numbers = Page(render_page(inputs, tmp_path)).numbers()
    assert STEPS * 1024 * forward_flops(TEACHER, 256) not in numbers
    assert 3 * STEPS * 1024 * forward_flops(STUDENT, 256) in numbers


def test_machine_hours_count_nodes(inputs: dict[str, Input], tmp_path: Path) -> None:
    manifest = inputs["distilled"].manifest
    config = {**manifest.config, "resources": {"nodes": 4, "devices": 8, "env": {}}}
    distilled = replace(inputs["distilled"], manifest=replace(manifest, config=config))
    page = Page(render_page({**inputs, "distilled": distilled}, tmp_path))
    machine_hours, processes = 4 * manifest.seconds / 3600, 4 * 8
    assert {machine_hours, processes} <= page.numbers()
