"""The report's sections of optional stages, and the cost of a run."""

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
from recipes.engines.results import BenchmarkResults
from recipes.evaluation.results import Differences, SourceQuality, TaskResults, TextQuality
from recipes.planning.inference_cost import ABLATED_FRACTION
from recipes.planning.results import PlanResult
from recipes.planning.transformer import forward_flops
from recipes.pruning.results import ScoreResult
from recipes.pruning.settings import ScoreConfig
from recipes.report.plots import Mark, trade_off_plot
from recipes.report.sections import PARAMETERS, PERPLEXITY
from recipes.search.results import SearchResult
from recipes.search.space import SEARCH_AXES
from recipes.stages import report
from tests.support.pages import OPTIONAL_PLOTS, Page, all_numbers, section
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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Input]:
    """A run with every optional stage."""
    run = tmp_path_factory.mktemp("full") / "run"
    return {**make_inputs(run, lm_weight=0.2), **make_optional_inputs(run)}


@pytest.fixture(scope="module")
def text(inputs: dict[str, Input], tmp_path_factory: pytest.TempPathFactory) -> str:
    return render_page(inputs, tmp_path_factory.mktemp("page"))


def test_names_are_escaped(inputs: dict[str, Input], tmp_path: Path) -> None:
    """Checks names of text sources, tasks, models, files, processors and libraries."""
    hostile = deepcopy(inputs)
    metrics = {name: item.manifest.metrics for name, item in hostile.items()}
    metrics["data"]["sources"] = [NASTY]
    fields = ("teacher", "pruned", "distilled", "sequences", "tokens", "predictions", "recovered")
    source = {name: metrics["evaluation"][name] for name in fields}
    metrics["evaluation"]["sources"] = {NASTY: source}
    tasks = metrics["tasks"]["tasks"].values()
    metrics["tasks"]["tasks"] = {f"{NASTY}{n}": {**t, "metric": NASTY} for n, t in enumerate(tasks)}
    metrics["speed"]["machine"]["cpu"] = NASTY
    for item in hostile.values():
        manifest = item.manifest
        manifest.versions[NASTY] = NASTY
        manifest.files[NASTY] = next(iter(manifest.files.values()))
        manifest.config |= dict.fromkeys(("hf_path", "teacher", "recipe"), NASTY)
    text = render_page(hostile, tmp_path)
    assert Page(text).text.count(NASTY) > 20
    assert "<script" not in text
    assert "<b>bold" not in text


def shown_numbers_of_sizes(result: dict[str, Any]) -> list[Any]:
    """Returns the numbers of added layers that a report shows. Numbers of layers are text."""
    names = ("loss", "loss_standard_error", "perplexity", "kl_to_teacher", "parameters")
    return [
        result["tokens"],
        *([size[name] for name in names] for size in result["sizes"].values()),
        *(s["perplexity"] for size in result["sizes"].values() for s in size["sources"].values()),
    ]


def test_sections_have_all_numbers_of_their_stages(inputs: dict[str, Input], text: str) -> None:
    metrics = {name: deepcopy(inputs[name].manifest.metrics) for name in OPTIONAL_INPUTS}
    for candidate in metrics["search"]["candidates"]:  # only axes that differ are shown
        candidate["shape"] = {axis: candidate["shape"][axis] for axis in SEARCH_AXES[:3]}
    for task in metrics["tasks"]["tasks"].values():
        del task["version"], task["differences"]["pruned"]
        for role in ("teacher", "pruned", "distilled"):
            # Shown as an interval.
            task[role]["standard_error"] = margin95(task[role]["standard_error"], task["items"])
            if task["answers"]:  # the table of answers has intervals only for differences
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
    assert not {*OPTIONAL_PLOTS} & set(Page(render_page(required, tmp_path)).values("id"))


def test_a_search_has_a_report(inputs: dict[str, Input], tmp_path: Path) -> None:
    page = Page(render_page({name: inputs[name] for name in ("teacher", "search")}, tmp_path))
    links = {link.removeprefix("#") for link in page.values("href")}
    assert links == {"search", "cost", "provenance"}
    assert "candidate 0 was chosen" in page.text


def test_the_plan_is_compared_with_the_run(text: str) -> None:
    # The measured tokens/s, and by how many percent the planned tokens/s exceed them.
    assert {1210.4, 100 * (1331.44 / 1210.4 - 1)} <= Page(section(text, "plan")).numbers()


def test_a_second_phase_has_its_own_plan_and_adds_its_tokens(tmp_path: Path) -> None:
    run = tmp_path / "run"
    inputs = {**make_inputs(run), **make_optional_inputs(run)}
    first = inputs["distilled"]
    result = first.manifest.result(DistillationResult)
    second = with_result(first, replace(result, tokens=500_000_000, tokens_per_second=150.0))
    manifest = replace(
        second.manifest, fingerprint="2" * 64, inputs={"student": first.manifest.fingerprint}
    )
    long = Input(run / "distill_long", manifest)
    plan = replace(RESULTS["plan"], tokens_per_second={"distill": 1650.0, "distill_long": 160.0})
    changed = {"distilled": long, "plan": with_result(inputs["plan"], plan)}
    text = render_page({**inputs, **changed}, tmp_path)
    assert {160.0, 150.0} <= Page(section(text, "plan")).numbers()
    summary = text.partition('<p class="summary">')[2].partition("</p>")[0]
    assert result.tokens + 500_000_000 in Page(summary).numbers()


def test_the_precision_of_the_teacher_is_named_if_the_student_is_quantized(
    inputs: dict[str, Input], text: str, tmp_path: Path
) -> None:
    results = inputs["speed"].manifest.result(BenchmarkResults)
    rows = [
        replace(row, backend="tensorrt_llm", precision="bf16" if row.role == "teacher" else "fp8")
        for row in results.rows
    ]
    speedup = replace(results.speedups[-1], backend="tensorrt_llm", precision="fp8")
    changed = replace(results, rows=rows, speedups=[replace(speedup, prefill_roofline=None)])
    page = render_page({**inputs, "speed": with_result(inputs["speed"], changed)}, tmp_path)
    for place in ('id="kpi-speed"', 'id="plot-speedups"'):
        assert "bf16" in page.partition(place)[2].partition("</td>")[0].partition("</div>")[0]
    assert "same engine" in text
    assert "same engine" not in page


def test_significant_difference_is_marked(inputs: dict[str, Input], tmp_path: Path) -> None:
    results = inputs["tasks"].manifest.result(TaskResults)
    worse = Differences(distilled=Difference(-0.2, -0.3, -0.1), pruned=Difference(-0.4, -0.5, -0.3))
    tasks = {name: replace(task, differences=worse) for name, task in results.tasks.items()}
    changed_tasks = with_result(inputs["tasks"], replace(results, tasks=tasks))
    text = render_page({**inputs, "tasks": changed_tasks}, tmp_path)
    assert '<span class="worse"><data value="-0.2" title="-0.2">−20.0</data></span>' in text
    # Scores that are not fractions have no colour, since lower may be better, as for perplexity.
    assert '<span class="even"><data value="-0.2" title="-0.2">−0.20</data></span>' in text


def test_gates_are_shown_with_the_measured_values(inputs: dict[str, Input], tmp_path: Path) -> None:
    """A gate is left out if no input has its value."""
    gates = ["recovered.sciq >= 0.85", "recovered.piqa >= 0.95", "speedup.decode > 1"]
    without_speed = {name: item for name, item in inputs.items() if name != "speed"}
    text = render_page(without_speed, tmp_path, replace(CONFIG, gates=gates))
    table = text[text.index('id="table-gates"') :].partition("</table>")[0]
    rows = [re.sub(r"<[^>]*>", " ", row).split() for row in table.split("<tr>")[2:]]  # no head
    assert [(row[0], row[-1]) for row in rows] == [
        ("recovered.sciq", "passed"),
        ("recovered.piqa", "failed"),
    ]
    measured = inputs["tasks"].manifest.metrics["tasks"]["piqa"]["recovered"]
    assert measured in Page(table).numbers()
    assert 'id="gates"' not in render_page(inputs, tmp_path)


def test_quality_by_data_source(inputs: dict[str, Input], tmp_path: Path) -> None:
    model = TextQuality(3.0265, 0.05, 20.625, 0.375, 0.6875)
    crawl = SourceQuality(model, model, model, 20, 5120, 5100, None)
    evaluation = with_result(
        inputs["evaluation"], replace(RESULTS["evaluate"], sources={"a web crawl": crawl})
    )
    page = Page(render_page({**inputs, "evaluation": evaluation}, tmp_path))
    assert {20.625, 0.375} <= page.numbers()
    assert "a web crawl" in page.text


def test_models_evaluated_on_one_sequence_have_no_interval(
    inputs: dict[str, Input], tmp_path: Path
) -> None:
    changed = deepcopy(inputs)
    for role in ("teacher", "pruned", "distilled"):
        changed["evaluation"].manifest.metrics[role]["loss_standard_error"] = None
    text = render_page(changed, tmp_path)
    table = text[text.index('id="table-quality"') :].partition("</table>")[0]
    assert not re.search(r"± *(<data|\d|inf)", table)
    assert re.search(r"± *(<data|\d)", render_page(inputs, tmp_path))
    plot = text[text.index('id="plot-quality"') :].partition("</svg>")[0]
    positions = re.findall(r' (?:x1|x2|cx)="(.*?)%?"', plot)
    assert positions
    assert all(0 <= float(position) <= 100 for position in positions)


@pytest.mark.parametrize(
    ("loss", "error"),
    [(math.nan, math.nan), (math.inf, math.nan), (3.8, 300.0), (3.8, 1e9), (705.0, 0.1)],
)
def test_a_failed_training_has_a_report(
    inputs: dict[str, Input], tmp_path: Path, loss: float, error: float
) -> None:
    """The loss of a failed training, or its standard error, may not be finite or be very large."""
    perplexity = math.exp(loss) if loss < 709 else loss
    result = RESULTS["evaluate"]
    distilled = replace(
        result.distilled, loss=loss, loss_standard_error=error, perplexity=perplexity
    )
    evaluation = with_result(inputs["evaluation"], replace(result, distilled=distilled))
    page = Page(render_page({**inputs, "evaluation": evaluation}, tmp_path))
    positions = [v for name in ("cx", "x1", "x2", "y1", "y2") for v in page.values(name)]
    assert positions
    assert not [position for position in positions if re.search("nan|inf", position)]


def test_a_plot_without_finite_values_is_empty() -> None:
    marks = [Mark("a", "distilled", 1e6, math.nan), Mark("b", "distilled", math.inf, 3.0)]
    assert "<circle" not in trade_off_plot("plot", marks, PARAMETERS, PERPLEXITY)


def test_every_label_is_drawn_once() -> None:
    """Each mark is close to the next one, and the first and the last are far from each other."""
    marks = [
        Mark(name, "distilled", x, 3.0) for name, x in (("a", 1e8), ("b", 1.03e8), ("c", 1.06e8))
    ]
    marks.append(Mark("d", "distilled", 2e8, 4.0))
    plot = trade_off_plot("plot", marks, PARAMETERS, PERPLEXITY)
    assert re.findall(r'class="mark"[^>]*>([^<]+)</text>', plot) == ["a, b", "c", "d"]


def test_only_the_best_of_many_candidates_have_labels_in_the_plot(
    inputs: dict[str, Input], tmp_path: Path
) -> None:
    search = inputs["search"].manifest.result(SearchResult)
    beaten = replace(search.candidates[1], pareto=False)
    more = [
        replace(beaten, name=f"beaten {n}", parameters=110_000_000 + 100_000 * n) for n in range(9)
    ]
    many = with_result(inputs["search"], replace(search, candidates=[*search.candidates, *more]))
    text = render_page({**inputs, "search": many}, tmp_path)
    plot = text[text.index('id="plot-search"') :].partition('id="table-search"')[0]
    labels = " ".join(re.findall(r'class="mark"[^>]*>([^<]*)</text>', plot))
    assert "candidate 0" in labels
    assert "beaten" not in labels
    assert plot.count("<circle") == len(search.candidates) + len(more)
    # Candidates 0 and 2. Candidate 3 is the smallest, but the only one that was not trained.
    assert plot.count("on the Pareto front") == 2


def test_flops_of_training_and_evaluation(text: str) -> None:
    tokens = STEPS * 1024
    teacher, student = (forward_flops(shape, 256) for shape in (TEACHER, STUDENT))
    total = tokens * (teacher + 3 * student)
    numbers = Page(text).numbers()
    assert {tokens * teacher, 3 * tokens * student, total, total / (tokens / 1210.4)} <= numbers
    # The evaluation of the teacher and of two models of the student's shape.
    assert 10240 * (teacher + 2 * student) in numbers


def test_flops_of_scoring_include_those_of_ablations(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "run")
    config = ScoreConfig("score", num_loss_samples=8, block_sizes=[4])
    result = ScoreResult("text", 64, 64 * 256, 3.0, {}, 2040)
    score = write_stage(tmp_path / "run", config, "importance", {"a": 5}, result)
    inputs["pruned"].manifest.inputs["importance"] = score.manifest.fingerprint
    ablations = LAYERS + (LAYERS - 3)  # single layers, and blocks of four
    passes = 64 + 8 * ABLATED_FRACTION * ablations
    numbers = Page(render_page(inputs, tmp_path)).numbers()
    assert any(n == pytest.approx(passes * 256 * forward_flops(TEACHER, 256)) for n in numbers)


def test_flops_of_a_cached_teacher_are_those_of_cache_logits(tmp_path: Path) -> None:
    """``cache_logits`` is not an input of the report; the run directory has its manifest."""
    run = tmp_path / "run"
    inputs = make_inputs(run)
    config = CacheLogitsConfig("cache_logits")
    cache = write_stage(
        run, config, "logit_cache", {"a": 5}, CacheResult(3036, 4000, 777_216, 258, 3.02, 0.01)
    )
    write_stage(run, StageConfig("unrelated"), "plan", {"b": 6}, PlanResult({}, []))
    inputs["distilled"].manifest.inputs["teacher"] = cache.manifest.fingerprint
    page = Page(render_page(inputs, tmp_path))
    assert 777_216 * forward_flops(TEACHER, 256) in page.numbers()
    assert STEPS * 1024 * forward_flops(TEACHER, 256) not in page.numbers()
    assert cache.manifest.seconds in page.numbers()
    assert "cache_logits" in page.text
    assert "unrelated" not in page.text


def test_training_without_a_loss_on_the_teacher_has_no_flops_of_the_teacher(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "run")
    inputs["distilled"].manifest.config["kd_weight"] = 0.0
    numbers = Page(render_page(inputs, tmp_path)).numbers()
    assert STEPS * 1024 * forward_flops(TEACHER, 256) not in numbers
    assert 3 * STEPS * 1024 * forward_flops(STUDENT, 256) in numbers


def test_machine_hours_count_nodes(inputs: dict[str, Input], tmp_path: Path) -> None:
    manifest = inputs["distilled"].manifest
    config = {**manifest.config, "resources": {"nodes": 4, "devices": 8, "env": {}}}
    wide = replace(inputs["distilled"], manifest=replace(manifest, config=config))
    page = Page(render_page({**inputs, "distilled": wide}, tmp_path))
    assert {4 * manifest.seconds / 3600, 32} <= page.numbers()  # 4 nodes with 8 processes each
