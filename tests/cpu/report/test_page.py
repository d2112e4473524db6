from __future__ import annotations

import html
import re
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest

from recipes.core.stage import Input
from recipes.distillation.results import DistillationResult
from recipes.pruning.results import PruneResult
from recipes.pruning.settings import PruneConfig
from recipes.report.page import render
from recipes.report.plots import Axis, Series, layer_plot, line_plot
from recipes.report.settings import REPORT_FILE, ReportConfig
from tests.support.reports import (
    CONFIG,
    DROPPED,
    LAYERS,
    NASTY,
    PLOTS,
    STUDENT,
    TEACHER,
    Page,
    changed,
    make_inputs,
    quality,
    rendered,
    wobble,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Input]:
    return make_inputs(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def page(inputs: dict[str, Input], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / REPORT_FILE
    render(CONFIG, inputs, path)
    return path


def every_number(value: Any) -> set[float]:
    if isinstance(value, dict):
        return {n for v in value.values() for n in every_number(v)}
    return {float(value)} if isinstance(value, int | float) else set()


def test_figures_are_the_manifests_figures(page: Path, inputs: dict[str, Input]) -> None:
    shown = Page(page.read_text(encoding="utf-8")).figures()
    manifests = {name: item.manifest for name, item in inputs.items()}
    expected = every_number(manifests["evaluation"].metrics)
    expected |= every_number(manifests["teacher"].metrics)
    expected |= every_number(manifests["exported"].metrics)
    expected |= every_number(manifests["data"].metrics)
    expected.add(manifests["pruned"].metrics["calibration_tokens"])
    expected.add(1 - STUDENT.parameters() / TEACHER.parameters())
    for shape in (TEACHER, STUDENT):
        axes = set(shape.as_dict()) - {"max_position_embeddings", "tied_embeddings"}
        expected |= every_number({axis: getattr(shape, axis) for axis in axes})
        expected.add(shape.parameters())
    for manifest in manifests.values():
        expected |= {manifest.seconds, manifest.peak_rss_bytes, manifest.total_bytes()}
        expected |= {stamp.size for stamp in manifest.files.values()}
    for key in ("max_steps", "global_batch_size", "seq_length", "lr", "min_lr", "warmup_steps"):
        expected.add(manifests["distilled"].config[key])
    assert expected <= shown


def test_figures_are_rounded_for_reading(page: Path) -> None:
    text = " ".join(Page(page.read_text(encoding="utf-8")).text.split())
    assert "86.5 M of the teacher’s 134.5 M parameters. Pruning took" in text
    assert "from 3.021 to 6.844; distillation on 409.6 K tokens brought it to 3.812." in text
    assert "Licence: CC-BY-4.0" in text
    for figure in ("79.3%", "35.7%", "938.0", "540.2 MB", "1 h 08 min", "4.0 GB", "1.14e−4"):
        assert figure in text


def test_page_is_self_contained(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert text.startswith("<!doctype html>")
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {t for t, _ in found.tags}
    assert found.values("src") == found.values("xlink:href") == []
    assert {link.removeprefix("#") for link in found.values("href")} <= set(found.values("id"))
    assert not re.search(r"https?:|url\(|@import", text)
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    assert set(PLOTS) <= set(ids)
    assert str(page.parent) not in text


def test_provenance_names_every_stage_and_file(page: Path, inputs: dict[str, Input]) -> None:
    found = Page(page.read_text(encoding="utf-8"))
    titles = set(found.values("title"))
    for item in inputs.values():
        manifest = item.manifest
        assert {manifest.fingerprint, manifest.code, manifest.git_sha} <= titles
        assert {stamp.sha256 for stamp in manifest.files.values()} <= titles
        assert manifest.stage in found.text
        assert manifest.started_at.replace("T", " ") in found.text
        assert all(version in found.text for version in manifest.versions.values())


def test_text_of_models_and_users_is_escaped(inputs: dict[str, Input], tmp_path: Path) -> None:
    text = rendered(inputs, tmp_path, replace(CONFIG, title=NASTY, description=NASTY))
    assert "<script" not in text
    assert text.count(html.escape(NASTY).replace("&#x27;", "&#39;")) == 4
    assert NASTY in Page(text).text


def test_layers_are_marked_kept_or_dropped(page: Path) -> None:
    found = Page(page.read_text(encoding="utf-8"))
    bars = [c.split()[1] for c in found.values("class") if c.startswith("bar ")]
    legend, bars = bars[:2], bars[2:]
    assert legend == ["kept", "dropped"]
    assert [n for n, fate in enumerate(bars, 1) if fate == "dropped"] == list(DROPPED)
    assert len(bars) == LAYERS
    assert "dropped: 9, 12, 13, 17, 20, 21, as the recipe named them" in found.text


@pytest.mark.parametrize(
    ("lm_weight", "terms"),
    [(0.0, ["logits"]), (0.5, ["logits", "next token", "total"])],
)
def test_only_loss_terms_in_use_are_drawn(
    tmp_path: Path, lm_weight: float, terms: list[str]
) -> None:
    text = rendered(make_inputs(tmp_path / "run", lm_weight=lm_weight), tmp_path)
    section = text[text.index('<section id="distillation">') : text.index('id="plot-loss"')]
    assert [label for label in re.findall(r"</svg>([^<]+)</span>", section)] == terms


def test_a_training_that_stopped_says_so(inputs: dict[str, Input], tmp_path: Path) -> None:
    trained = inputs["distilled"].manifest.result(DistillationResult)
    made = changed(
        inputs["distilled"], replace(trained, stopped="stopped at step 60 of 400: enough")
    )
    text = rendered({**inputs, "distilled": made}, tmp_path)
    assert "tokens per second. It stopped at step 60 of 400: enough." in Page(text).text


def test_nothing_lost_nothing_recovered(inputs: dict[str, Input], tmp_path: Path) -> None:
    evaluation = changed(inputs["evaluation"], replace(quality(), recovered=None))
    text = rendered({**inputs, "evaluation": evaluation}, tmp_path)
    assert "there was nothing to recover" in Page(text).text
    assert "None" not in text


@pytest.mark.parametrize("share", [-0.4, 1.2])
def test_recovered_may_lie_outside_0_to_1(
    inputs: dict[str, Input], tmp_path: Path, share: float
) -> None:
    evaluation = changed(inputs["evaluation"], replace(quality(), recovered=share))
    text = rendered({**inputs, "evaluation": evaluation}, tmp_path)
    assert share in Page(text).figures()
    assert 'width="-' not in text


def test_targets_by_number_of_layers(inputs: dict[str, Input], tmp_path: Path) -> None:
    config = asdict(PruneConfig("prune", target_num_layers=24))
    pruned = replace(inputs["pruned"], manifest=replace(inputs["pruned"].manifest, config=config))
    text = Page(rendered({**inputs, "pruned": pruned}, tmp_path)).text
    assert re.search(r"Pruning targets\s+Layers24\s*Calibration windows", text)
    assert "dropped: 9, 12, 13, 17, 20, 21." in text


def test_pruning_of_width_keeps_every_layer(inputs: dict[str, Input], tmp_path: Path) -> None:
    kept = list(range(1, LAYERS + 1))
    result = replace(inputs["pruned"].manifest.result(PruneResult), kept_layers=kept)
    text = rendered({**inputs, "pruned": changed(inputs["pruned"], result)}, tmp_path)
    assert "All 30 layers were kept." in Page(text).text
    assert "bar dropped" not in text


def test_optional_records_may_be_missing(inputs: dict[str, Input], tmp_path: Path) -> None:
    """Where the checkpoints were made by other stages than usual, without a log."""
    bare = {}
    for name, item in inputs.items():
        other = "checkpoint" in item.manifest.kind
        manifest = replace(
            item.manifest, architecture=None, parameters=None, versions={}, git_sha=None, files={},
            **({"stage": "other", "config": {}, "metrics": {}} if other else {}),
        )  # fmt: skip
        bare[name] = Input(tmp_path / name, manifest)
    text = rendered(bare, tmp_path, ReportConfig("report"))
    for note in ("No training steps were logged", "No layer importance", "No text was generated"):
        assert note in text
    assert "None" not in Page(text).text


def test_one_dominant_layer_does_not_flatten_the_rest() -> None:
    scores = {1: 16.1, 2: 2.6, **{layer: 0.4 + layer / 100 for layer in range(3, 31)}}
    plot = layer_plot("plot-layers", "Layers", scores, set(scores))
    heights = [float(h) for h in re.findall(r'class="bar kept".*?height="([\d.]+)%"', plot)]
    assert len(heights) == 30
    assert min(heights) > 10
    assert heights.index(min(heights)) + 1 == min(scores, key=scores.__getitem__)


def test_layer_scores_of_zero_are_drawn() -> None:
    assert layer_plot("plot-layers", "Layers", {1: 0.0, 2: 5.0, 3: 0.0}, {2}).count("<rect") == 3
    assert layer_plot("plot-layers", "Layers", {1: 0.0}, {1}).count("<rect") == 1


def test_long_runs_stay_small() -> None:
    points = [(float(n), wobble(n)) for n in range(1, 100_001)]
    plot = line_plot("plot-long", "Long", [Series("loss", "total", points)])
    assert len(plot) < 50_000
    assert "100,000" in plot


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (2.9, 7.1, [3, 4, 5, 6, 7]), (0, 1e-4, None), (-1, 1, None)],
)
def test_ticks_are_round_and_inside(low: float, high: float, ticks: list[float] | None) -> None:
    found = Axis(low, high).ticks()
    assert ticks is None or found == pytest.approx(ticks)
    assert 3 <= len(found) <= 7
    assert all(low <= tick <= high * (1 + 1e-9) for tick in found)
