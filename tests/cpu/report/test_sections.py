"""Sections of the report that come with an optional stage, and what a run cost."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from recipes.core.stage import Input, StageConfig
from recipes.core.statistics import Difference
from recipes.distillation.results import CacheResult
from recipes.distillation.settings import CacheLogitsConfig
from recipes.evaluation.results import Differences, SourceQuality, TaskResults, TextQuality
from recipes.planning.results import PlanResult
from recipes.search.results import SearchResult
from recipes.search.space import SEARCH_AXES
from recipes.stages import report
from tests.support.reports import (
    CONFIG,
    NASTY,
    OPTIONAL_PLOTS,
    STEPS,
    STUDENT,
    TEACHER,
    Page,
    changed,
    make_inputs,
    optional_inputs,
    quality,
    rendered,
    stage,
)

if TYPE_CHECKING:
    from pathlib import Path

OPTIONAL_INPUTS = tuple(report.STAGE.optional_inputs)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Input]:
    """A run with every optional stage."""
    run = tmp_path_factory.mktemp("full") / "run"
    return {**make_inputs(run, lm_weight=0.2), **optional_inputs(run)}


@pytest.fixture(scope="module")
def page(inputs: dict[str, Input], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(rendered(inputs, tmp_path_factory.mktemp("page")))


def test_names_of_others_are_no_markup(inputs: dict[str, Input], tmp_path: Path) -> None:
    """Of documents, tasks, models, files, processors and libraries, in tables, plots and hints."""
    hostile = deepcopy(inputs)
    figures = {name: item.manifest.metrics for name, item in hostile.items()}
    figures["data"]["sources"] = [NASTY]
    figures["data"]["source_tokens"] = {"train": [{"source": NASTY, "tokens": 5}]}
    kept = ("teacher", "pruned", "distilled", "windows", "tokens", "recovered")
    source = {name: figures["evaluation"][name] for name in kept}
    figures["evaluation"]["sources"] = {NASTY: source}
    figures["tasks"]["tasks"] = {NASTY + str(n): t for n, t in enumerate(tasks(figures))}
    figures["speed"]["machine"]["processor"] = NASTY
    for item in hostile.values():
        manifest = item.manifest
        manifest.versions[NASTY] = NASTY
        manifest.files[NASTY] = next(iter(manifest.files.values()))
        for setting in ("hf_path", "teacher", "recipe"):
            manifest.config[setting] = NASTY
    text = rendered(hostile, tmp_path)
    assert Page(text).text.count(NASTY) > 20
    assert "<script" not in text
    assert "<b>bold" not in text
    assert "onload" not in text


def tasks(figures: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**task, "metric": NASTY} for task in figures["tasks"]["tasks"].values()]


def every_figure(value: Any) -> set[float]:
    """Numbers anywhere in nested data; truth values are none."""
    if isinstance(value, list):
        return {n for v in value for n in every_figure(v)}
    if isinstance(value, dict):
        return {n for v in value.values() for n in every_figure(v)}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {float(value)} if is_number else set()


def test_optional_stages_show_all_their_figures(inputs: dict[str, Input], page: Page) -> None:
    metrics = {name: deepcopy(inputs[name].manifest.metrics) for name in OPTIONAL_INPUTS}
    for candidate in metrics["search"]["candidates"]:  # of shapes, what differs is shown
        candidate["shape"] = {axis: candidate["shape"][axis] for axis in SEARCH_AXES[:3]}
    for task in metrics["tasks"]["tasks"].values():
        del task["version"], task["differences"]["pruned"]
        for role in ("teacher", "pruned", "distilled"):
            task[role]["standard_error"] *= 1.96  # shown as an interval
            if task["answers"]:  # whose differences alone have intervals
                del task["answers"][role]["standard_error"]
    assert every_figure(metrics) <= page.figures()
    assert set(OPTIONAL_PLOTS) <= set(page.values("id"))
    ends = page.values("href")
    assert {f"#{name}" for name in (*OPTIONAL_INPUTS, "trade_offs")} <= set(ends)


def test_the_plan_is_compared_with_the_run(page: Page) -> None:
    assert "planned at 1,331 tokens per second and ran at 1,210: the plan is +10%." in page.text


@pytest.mark.parametrize("name", OPTIONAL_INPUTS)
def test_a_section_appears_with_its_input(
    inputs: dict[str, Input], tmp_path: Path, name: str
) -> None:
    chain = {key: item for key, item in inputs.items() if key not in OPTIONAL_INPUTS}
    bare = Page(rendered(chain, tmp_path))
    assert not {*OPTIONAL_INPUTS, *OPTIONAL_PLOTS} & set(bare.values("id"))
    found = Page(rendered({**chain, name: inputs[name]}, tmp_path))
    assert {*OPTIONAL_INPUTS} & set(found.values("id")) == {name}


def test_difference_beyond_its_interval_is_marked(inputs: dict[str, Input], tmp_path: Path) -> None:
    found = inputs["tasks"].manifest.result(TaskResults)
    worse = Differences(distilled=Difference(-0.2, -0.3, -0.1), pruned=Difference(-0.4, -0.5, -0.3))
    tasks = {name: replace(task, differences=worse) for name, task in found.tasks.items()}
    result = replace(found, tasks=tasks)
    text = rendered({**inputs, "tasks": changed(inputs["tasks"], result)}, tmp_path)
    assert '<span class="worse"><data value="-0.2" title="-0.2">−20.0</data></span>' in text
    # Nobody says which way a perplexity is better.
    assert '<span class="even"><data value="-0.2" title="-0.2">−0.20</data></span>' in text


def test_gates_are_shown_with_what_was_measured(inputs: dict[str, Input], tmp_path: Path) -> None:
    """But for one whose figure no stage of the run measures."""
    demanded = ["recovered.sciq >= 0.85", "recovered.piqa >= 0.95", "speedup.decode > 1"]
    gated = replace(CONFIG, gates=demanded)
    chain = {name: item for name, item in inputs.items() if name != "speed"}
    text = rendered(chain, tmp_path, gated)
    table = text[text.index('id="table-gates"') :].partition("</table>")[0]
    rows = [re.sub(r"<[^>]*>", " ", row).split() for row in table.split("<tr>")[2:]]
    assert [(row[0], row[-1]) for row in rows] == [
        ("recovered.sciq", "passed"),
        ("recovered.piqa", "failed"),
    ]
    measured = inputs["tasks"].manifest.metrics["tasks"]["piqa"]["recovered"]
    assert measured in Page(table).figures()
    assert 'id="gates"' not in rendered(inputs, tmp_path)


def test_quality_by_source_of_the_text(inputs: dict[str, Input], tmp_path: Path) -> None:
    text = TextQuality(3.0265, 0.05, 20.625, 0.375, 0.6875)
    crawl = SourceQuality(text, text, text, 20, 5120, None)
    evaluation = changed(inputs["evaluation"], replace(quality(), sources={"a web crawl": crawl}))
    found = Page(rendered({**inputs, "evaluation": evaluation}, tmp_path))
    assert {20.625, 0.375} <= found.figures()
    assert "a web crawl" in found.text


def test_search_says_whether_candidates_were_distilled(
    inputs: dict[str, Input], tmp_path: Path
) -> None:
    text = Page(rendered(inputs, tmp_path)).text
    assert "before any distillation; 3 were measured again after a short one." in text
    found = inputs["search"].manifest.result(SearchResult)
    untrained = replace(found, candidates=[replace(one, tokens=0) for one in found.candidates])
    search = changed(inputs["search"], untrained)
    text = Page(rendered({**inputs, "search": search}, tmp_path)).text
    assert "by a cheap proxy before any distillation." in text


def test_many_candidates_are_not_all_named_in_the_plot(
    inputs: dict[str, Input], tmp_path: Path
) -> None:
    found = inputs["search"].manifest.result(SearchResult)
    beaten = replace(found.candidates[1], pareto=False)
    more = [
        replace(beaten, name=f"beaten {n}", parameters=110_000_000 + 100_000 * n) for n in range(9)
    ]
    search = changed(inputs["search"], replace(found, candidates=[*found.candidates, *more]))
    text = rendered({**inputs, "search": search}, tmp_path)
    plot = text[text.index('id="plot-search"') :].partition('id="table-search"')[0]
    labels = " ".join(re.findall(r'class="mark"[^>]*>([^<]*)</text>', plot))
    assert "candidate 0" in labels
    assert "beaten" not in labels
    assert plot.count("<circle") == 13


def test_cost_counts_tokens_times_the_shapes(page: Page) -> None:
    tokens = STEPS * 1024
    teacher, student = (shape.forward_flops_per_token() for shape in (TEACHER, STUDENT))
    together = tokens * (teacher + 3 * student)
    assert {tokens * teacher, 3 * tokens * student, together} <= page.figures()
    assert together / (tokens / 1210.4) in page.figures()
    assert 16384 * teacher in page.figures()
    assert 10240 * (teacher + 2 * student) in page.figures()


def test_a_cached_teacher_costs_its_own_stage(tmp_path: Path) -> None:
    """Its stage is no input of the report; it is found beside the distillation."""
    run = tmp_path / "run"
    found = make_inputs(run)
    config = CacheLogitsConfig("cache_logits")
    cache = stage(
        run, config, "logit_cache", {"a": 5}, CacheResult(3036, 4000, 777_216, 258, 3.02, 0.01)
    )
    stage(run, StageConfig("stranger"), "plan", {"b": 6}, PlanResult({}, []))
    found["distilled"].manifest.inputs["teacher"] = cache.manifest.fingerprint
    page = Page(rendered(found, tmp_path))
    assert 777_216 * TEACHER.forward_flops_per_token() in page.figures()
    assert STEPS * 1024 * TEACHER.forward_flops_per_token() not in page.figures()
    assert cache.manifest.seconds in page.figures()
    assert "cache_logits" in page.text
    assert "stranger" not in page.text


def test_machine_hours_count_nodes(inputs: dict[str, Input], tmp_path: Path) -> None:
    manifest = inputs["distilled"].manifest
    config = {**manifest.config, "resources": {"nodes": 4, "devices": 8, "env": {}}}
    wide = replace(inputs["distilled"], manifest=replace(manifest, config=config))
    page = Page(rendered({**inputs, "distilled": wide}, tmp_path))
    assert {4 * manifest.seconds / 3600, 32} <= page.figures()
