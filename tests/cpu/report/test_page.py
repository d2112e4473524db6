"""Tests the report of a run without optional stages: its numbers, text and plots."""

from __future__ import annotations

import html
import re
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import pytest

from nemo_convert.licences import with_restriction
from recipes.core.manifest import Acceptance
from recipes.core.metrics import METRICS, RESULT_METRICS
from recipes.core.stage import Input
from recipes.data.results import Origin, TrainedSource
from recipes.pruning.settings import PruneConfig
from recipes.report.plots import (
    MAX_ROW_LABEL,
    Axis,
    Series,
    interval_plot,
    layer_plot,
    line_plot,
)
from recipes.report.settings import ReportConfig
from tests.support.pages import PLOTS, Page, all_numbers, render_with, section, table
from tests.support.reports import CONFIG, make_inputs, render_page, with_result, write_training_log
from tests.support.results import (
    DROPPED,
    LAYERS,
    NASTY,
    RESULTS,
    SOURCE,
    STUDENT,
    TEACHER,
    wobble,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Input]:
    """The required inputs of a report, by name."""
    return make_inputs(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def page_html(inputs: dict[str, Input], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of ``inputs`` as HTML."""
    return render_page(inputs, tmp_path_factory.mktemp("report"))


def test_page_has_the_numbers_of_all_manifests(page_html: str, inputs: dict[str, Input]) -> None:
    manifests = {name: item.manifest for name, item in inputs.items()}
    expected = {1 - STUDENT.parameters() / TEACHER.parameters()}  # pruned fraction of parameters
    for name in ("evaluation", "teacher", "exported", "data"):
        expected |= all_numbers(manifests[name].metrics)
    expected.add(manifests["pruned"].metrics["calibration_tokens"])
    for shape in (TEACHER, STUDENT):
        not_shown = {"max_position_embeddings", "tied_embeddings", "hf_architecture"}
        expected |= {getattr(shape, field) for field in set(shape.as_dict()) - not_shown}
        expected.add(shape.parameters())
    for manifest in manifests.values():
        expected |= {manifest.seconds, manifest.peak_rss_bytes, manifest.total_bytes()}
        expected |= {stamp.size for stamp in manifest.files.values()}
    for key in ("max_steps", "global_batch_size", "seq_length", "lr", "min_lr", "warmup_steps"):
        expected.add(manifests["distilled"].config[key])
    assert expected <= Page(page_html).numbers()


def test_sizes_of_experts_are_listed(
    page_html: str, inputs: dict[str, Input], tmp_path: Path
) -> None:
    """The teacher has 8 experts and the student 6, which are 25% fewer."""
    shape = {**STUDENT.as_dict(), "moe_ffn_hidden_size": 96}
    moe_inputs = {}
    for role, experts in (("teacher", 8), ("distilled", 6)):
        architecture = {**shape, "num_moe_experts": experts}
        manifest = replace(inputs[role].manifest, architecture=architecture)
        moe_inputs[role] = replace(inputs[role], manifest=manifest)
    moe_html = render_page({**inputs, **moe_inputs}, tmp_path)
    shapes = table(moe_html, "architecture")
    assert re.search(r">Experts</th>.*>8<.*>6<.*−25.0%", shapes)
    assert "Expert FFN size" in shapes
    assert "Expert" not in page_html, "the report of a dense model mentions experts"


def test_numbers_are_rounded(page_html: str) -> None:
    """The unrounded values are in ``tests/support``, such as the teacher's loss of 3.0214."""
    shown = Page(page_html).text
    for number in ("86.5 M", "3.021", "409.6 K", "79.3%", "938.0", "540.2 MB", "1 h 08 min"):
        assert number in shown
    for number in ("4.0 GB", "1.14e−4"):
        assert number in shown
    assert "CC-BY-4.0" in shown  # the number in a license's name is not rounded


def test_the_training_speed_is_rounded(inputs: dict[str, Input], tmp_path: Path) -> None:
    result = replace(RESULTS["distill"], tokens_per_second=171.14999999999998)
    shown = Page(render_with(inputs, tmp_path, distilled=result)).text
    assert "171 " in shown
    assert "171.1" not in shown


def test_long_names_of_rows_are_shortened() -> None:
    names = ["sciq", "mmlu_high_school_physics", "mmlu_high_school_biology"]
    plot = interval_plot("plot", "Scores", {name: [("teacher", 0.5, 0.1)] for name in names})
    # Pairs of the visible label and its tooltip, which has the whole name.
    labels = re.findall(r'class="row".*?>(.*?)<title>(.*?)</title>', plot)
    assert [name for _, name in labels] == names
    assert max(len(label) for label, _ in labels) <= MAX_ROW_LABEL
    assert len({label for label, _ in labels}) == 3  # shortened labels remain distinct


def test_licences_of_teacher_and_text_are_shown(
    inputs: dict[str, Input], page_html: str, tmp_path: Path
) -> None:
    """Shows both licences with a remark, since they forbid commercial use."""
    licences = [with_restriction(licence) for licence in ("qwen-research", "CC-BY-NC-4.0")]
    assert not any(licence in page_html for licence in licences)
    teacher = replace(RESULTS["import_hf"], licence="qwen-research")
    dataset = replace(RESULTS["prepare_data"], origins={SOURCE: Origin("CC-BY-NC-4.0")})
    restricted_html = render_with(inputs, tmp_path, teacher=teacher, data=dataset)
    shown = Page(section(restricted_html, "settings")).text
    assert [licence for licence in licences if licence not in shown] == []


def test_a_report_states_that_pretokenized_text_was_not_compared(
    page_html: str, inputs: dict[str, Input], tmp_path: Path
) -> None:
    assert "not compared" not in page_html
    # Only the result of pretokenized text has a decoded sample.
    pretokenized = replace(RESULTS["prepare_data"], sample="Once upon")
    shown = section(render_with(inputs, tmp_path, data=pretokenized), "settings")
    assert "not compared with held-out text and benchmarks" in shown


def test_results_come_before_settings_and_plan(page_html: str) -> None:
    sections = re.findall(r'<section id="(\w+)"', page_html)
    assert sections[0] == "quality"
    assert sections.index("distillation") < sections.index("settings") < sections.index("cost")
    # The navigation links to every section, in the same order.
    assert sections == [link.removeprefix("#") for link in Page(page_html).values("href")]


def test_page_is_self_contained(page_html: str, inputs: dict[str, Input]) -> None:
    page = Page(page_html)
    tags = {tag for tag, _ in page.tags}
    assert not {"script", "link", "img", "iframe", "object", "embed"} & tags
    assert page.values("src") == page.values("xlink:href") == []
    assert not re.search(r"https?:|url\(|@import", page_html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert set(PLOTS) <= set(ids)
    assert str(inputs["teacher"].directory) not in page_html  # no paths of this machine


def test_provenance_lists_every_stage_and_file(page_html: str, inputs: dict[str, Input]) -> None:
    page = Page(page_html)
    titles = set(page.values("title"))  # tooltips; a hash is shown shortened, with a tooltip
    for item in inputs.values():
        manifest = item.manifest
        assert {manifest.fingerprint, manifest.code, manifest.git_sha} <= titles
        assert {stamp.sha256 for stamp in manifest.files.values()} <= titles
        start = manifest.started_at.replace("T", " ")
        details = (manifest.stage, start, *manifest.versions.values())
        assert all(detail in page.text for detail in details)


def test_stale_results_that_were_kept_are_listed(inputs: dict[str, Input], tmp_path: Path) -> None:
    distilled = inputs["distilled"]
    acceptance = Acceptance(fingerprint="f", reasons=["lr changed 1 → 2", "its code changed"])
    accepted = replace(distilled, manifest=replace(distilled.manifest, accepted=acceptance))
    text = Page(render_page({**inputs, "distilled": accepted}, tmp_path)).text
    assert "The result of distill was kept although lr changed 1 → 2, its code changed." in text


def test_text_of_models_and_users_is_escaped(inputs: dict[str, Input], tmp_path: Path) -> None:
    page_html = render_page(inputs, tmp_path, replace(CONFIG, title=NASTY, description=NASTY))
    assert "<script" not in page_html
    escaped = html.escape(NASTY).replace("&#x27;", "&#39;")  # Jinja's code for an apostrophe
    # The title occurs in the head and in the body. The description and a generated text occur once.
    assert page_html.count(escaped) == 4
    assert NASTY in Page(page_html).text


def test_dropped_layers_are_marked(page_html: str) -> None:
    # A bar's class is "bar kept" or "bar dropped".
    classes = [c for c in Page(page_html).values("class") if c.startswith("bar ")]
    styles = [name.removeprefix("bar ") for name in classes]
    legend, bars = styles[:2], styles[2:]  # the legend has one bar of each style
    assert legend == ["kept", "dropped"]
    assert [n for n, style in enumerate(bars, 1) if style == "dropped"] == list(DROPPED)
    assert len(bars) == LAYERS


@pytest.mark.parametrize("drop_layers", [[], list(DROPPED)])
@pytest.mark.parametrize("method", ["loss", "block"])
def test_layer_scores_are_not_named_as_the_reason_to_drop_a_block(
    inputs: dict[str, Input], tmp_path: Path, method: str, drop_layers: list[int]
) -> None:
    """The method ``block`` drops a block of adjacent layers by their joint loss.

    The page must mention the block, unless the recipe lists the layers to drop.
    """
    manifest = inputs["pruned"].manifest  # its scores of layers are their block influence
    config = {**manifest.config, "layer_importance": method, "drop_layers": drop_layers}
    pruned = replace(inputs["pruned"], manifest=replace(manifest, config=config))
    shown = Page(section(render_page({**inputs, "pruned": pruned}, tmp_path), "layers")).text
    assert ("block" in shown) == (method == "block" and not drop_layers)
    assert not re.search(r"[a-z]\.\w", shown), "a space is missing after a sentence"


@pytest.mark.parametrize(("lm_weight", "curves"), [(0.0, 1), (0.5, 3)])
def test_only_loss_terms_in_use_are_drawn(tmp_path: Path, lm_weight: float, curves: int) -> None:
    """KD and LM loss have three curves: one for each, and one for their weighted sum.

    The run also has the metrics of an unfinished restart with the other ``lm_weight``. The report
    must use the metrics of the complete result instead.
    """
    inputs = make_inputs(tmp_path / "run", lm_weight=lm_weight)
    distilled = inputs["distilled"].directory
    (distilled / METRICS).rename(distilled / RESULT_METRICS)
    write_training_log(distilled, lm_weight=0.5 - lm_weight)
    page_html = render_page(inputs, tmp_path)
    assert section(page_html, "distillation").count('class="key"') == curves


def test_early_stop_is_reported(inputs: dict[str, Input], tmp_path: Path) -> None:
    result = replace(RESULTS["distill"], stopped="stopped at step 60 of 400")
    page = Page(render_with(inputs, tmp_path, distilled=result))
    assert "stopped at step 60" in page.text


def test_tokens_and_epochs_of_training_sources_are_listed(
    inputs: dict[str, Input], tmp_path: Path
) -> None:
    # Source, tokens and epochs. The report marks a source that is read more than 4 times.
    sources = [TrainedSource("repeated", 301, 4.25), TrainedSource("fresh", 1707, 1.75)]
    result = replace(RESULTS["distill"], sources=sources)
    page_html = render_with(inputs, tmp_path, distilled=result)
    _, _head, repeated, fresh = table(page_html, "trained").split("<tr>")
    assert all(value in repeated for value in ("repeated", "301", "4.25", 'class="tag"'))
    assert all(value in fresh for value in ("fresh", "1,707", "1.75"))
    assert 'class="tag"' not in fresh


@pytest.mark.parametrize("fraction", [None, -0.4, 1.2])
def test_recovered_may_be_unknown_or_outside_0_to_1(
    inputs: dict[str, Input], tmp_path: Path, fraction: float | None
) -> None:
    evaluation = replace(RESULTS["evaluate"], recovered=fraction)
    page_html = render_with(inputs, tmp_path, evaluation=evaluation)
    assert fraction is None or fraction in Page(page_html).numbers()
    # A negative fraction is explained: distillation raised the loss further.
    assert ("further" in Page(page_html).text) == (fraction == -0.4)
    assert "None" not in page_html
    assert 'width="-' not in page_html  # no bar with a negative width


def test_a_width_pruned_model_has_no_dropped_layers(
    inputs: dict[str, Input], tmp_path: Path
) -> None:
    all_layers = list(range(1, LAYERS + 1))
    result = replace(RESULTS["prune"], kept_layers=all_layers)
    pruned = with_result(inputs["pruned"], result)
    config = asdict(PruneConfig("prune", target_hidden_size=448))
    pruned = replace(pruned, manifest=replace(pruned.manifest, config=config))
    page_html = render_page({**inputs, "pruned": pruned}, tmp_path)
    assert "bar dropped" not in page_html
    assert 448 in Page(section(page_html, "settings")).numbers()


def test_optional_records_may_be_missing(inputs: dict[str, Input], tmp_path: Path) -> None:
    """Checkpoints of an unknown stage have no settings or metrics, and no training log exists."""
    bare_inputs = {}
    for name, item in inputs.items():
        is_checkpoint = "checkpoint" in item.manifest.kind
        manifest = replace(
            item.manifest, architecture=None, parameters=None, versions={}, git_sha=None, files={},
            **({"stage": "other", "config": {}, "metrics": {}} if is_checkpoint else {}),
        )  # fmt: skip
        bare_inputs[name] = Input(tmp_path / name, manifest)  # a directory that does not exist
    page = Page(render_page(bare_inputs, tmp_path, ReportConfig("report")))
    assert "None" not in page.text
    assert not {"plot-loss", "plot-layers", "plot-work"} & set(page.values("id"))


def test_one_dominant_layer_does_not_flatten_the_others() -> None:
    """On a linear scale, most bars would have 3% of the height of the highest."""
    scores = {1: 16.1, 2: 2.6, **{layer: 0.4 + layer / 100 for layer in range(3, 31)}}
    plot = layer_plot("plot-layers", "Layers", scores, set(scores))
    heights = [float(h) for h in re.findall(r'class="bar kept".*?height="([\d.]+)%"', plot)]
    assert len(heights) == 30
    assert min(heights) > 10  # percent of the plot's height
    lowest_layer = min(scores, key=scores.__getitem__)
    assert heights.index(min(heights)) + 1 == lowest_layer  # layers count from 1


@pytest.mark.parametrize("scores", [{1: 0.0, 2: 5.0, 3: 0.0}, {1: 0.0}])
def test_layer_scores_of_zero_are_drawn(scores: dict[int, float]) -> None:
    assert layer_plot("plot-layers", "Layers", scores, {1}).count("<rect") == len(scores)


def test_plots_of_long_runs_are_small() -> None:
    """A plot draws at most about ``MAX_POINTS`` of the points, and always the last one."""
    points = [(float(step), wobble(step)) for step in range(1, 100_001)]
    plot = line_plot("plot-long", "Long", [Series("loss", "total", points)])
    assert len(plot) < 50_000  # characters
    assert "100,000" in plot  # the last step


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (2.9, 7.1, [3, 4, 5, 6, 7]), (0, 1e-4, None), (-1, 1, None)],
)
def test_ticks_are_round_numbers_on_the_axis(
    low: float, high: float, ticks: list[float] | None
) -> None:
    """``ticks`` is ``None`` if only the number of ticks and their range are checked."""
    values = Axis(low, high).ticks()
    assert ticks is None or values == pytest.approx(ticks)
    assert 3 <= len(values) <= 7
    assert all(low <= tick <= high * (1 + 1e-9) for tick in values)
