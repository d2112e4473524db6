"""Tests comparisons of runs: the page, the best run, and runs that cannot be compared."""

from __future__ import annotations

import math
import re
import shlex
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.commands import compare
from launch.sweep import best_of
from recipes.core.errors import RecipeError
from recipes.core.manifest import read_manifest
from recipes.core.run_state import InputRef, LastPlan, Request, read_last_plan, read_request
from recipes.core.statistics import pareto_front
from recipes.report.compare import compare_runs, describe_best
from recipes.report.format import render_template
from recipes.report.runs import RunRecord, find_runs, paired_difference, read_run
from tests.support.pages import Page
from tests.support.reports import make_run


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five runs: three evaluated on the same text, one on other text, and one not evaluated.

    Run 1 has the lowest loss on the common text. The slower of these three runs have lower losses.
    """
    root = tmp_path_factory.mktemp("sweeps") / "sweep"
    root.mkdir()
    make_run(root / "0", loss=3.8125)
    make_run(root / "1", loss=3.65, speed=0.8, lr=3e-4, max_steps=800)
    make_run(root / "2", loss=3.9, speed=1.2, lr=1e-3)
    make_run(root / "10", loss=3.1, heldout="ab" * 32)  # the hash of other text
    (make_run(root / "11", loss=3.2) / "evaluate" / "manifest.json").unlink()
    return root


@pytest.fixture
def runs(sweep: Path) -> list[RunRecord]:
    """The three runs of ``sweep`` on the same text, best run last. The test may change them."""
    return [read_run(sweep / name) for name in ("2", "0", "1")]


@pytest.fixture(scope="module")
def page(sweep: Path) -> Page:
    """The page that ``compare`` writes about the runs of ``sweep``."""
    out = sweep.parent / "compare.html"
    console = Console(file=StringIO(), soft_wrap=True)
    compare([str(sweep), f"out={out}"], console)
    title, verdict_line = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert title == f"4 runs compared in {out}"
    assert verdict_line.startswith("best: sweep/1, ")
    assert "38.47" in verdict_line  # the perplexity, exp(3.65)
    return Page(out.read_text(encoding="utf-8"))


def test_a_sweep_names_the_best_run_and_the_command_that_compares(sweep: Path) -> None:
    best, command = best_of(find_runs([sweep])).splitlines()  # two lines
    assert best.startswith("best: sweep/1, ")
    arguments = shlex.split(command.partition("python launch/run.py compare ")[2])
    assert [Path(argument).resolve() for argument in arguments] == find_runs([sweep])


def test_runs_of_a_sweep_are_found_in_the_order_of_their_numbers(sweep: Path) -> None:
    assert [run.name for run in find_runs([sweep])] == ["0", "1", "2", "10", "11"]
    # A path that is named first comes first, and is not repeated.
    assert [run.name for run in find_runs([sweep / "2", sweep])] == ["2", "0", "1", "10", "11"]


def test_page_shows_the_numbers_of_the_manifests(page: Page, sweep: Path) -> None:
    page_numbers = page.numbers()
    for name in ("0", "1", "2", "10"):
        evaluation = read_manifest(sweep / name / "evaluate")
        exported = read_manifest(sweep / name / "export_hf")
        assert evaluation is not None
        assert exported is not None
        metrics = evaluation.metrics["distilled"]
        keys = ("perplexity", "loss", "kl_to_teacher", "parameters")
        assert {metrics[key] for key in keys} <= page_numbers
        assert exported.total_bytes() in page_numbers


def test_pareto_fronts_have_the_runs_that_no_other_run_dominates(sweep: Path) -> None:
    plots = compare_runs([read_run(run) for run in find_runs([sweep])])["plots"]
    # The first plots show perplexity against parameters, disk and latency, in this order. Points
    # have the numbers of their rows: run 0 is row 1.
    fronts = [re.findall(r"<title>(\d): [^<]*on the Pareto front", plot["plot"]) for plot in plots]
    assert fronts[0] == ["2"], "all runs have the same size, so only the best perplexity counts"
    assert fronts[2] == ["1", "2", "3"], "each slower run has a better perplexity"
    assert pareto_front([(1, 1), (1, 1), (2, 1), (2, 2)]) == {0, 1}, "equal points both count"


def test_runs_that_are_not_significantly_worse_are_listed_beside_the_best(tmp_path: Path) -> None:
    # The losses differ by less than the noise that ``make_run`` adds to them.
    runs = [make_run(tmp_path / name, loss=loss) for name, loss in (("a", 3.65), ("b", 3.652))]
    rows = compare_runs([read_run(run) for run in runs])["rows"]
    assert describe_best(rows).endswith("at 95%: b")


def test_mean_scores_cover_only_the_tasks_that_all_runs_have_in_common(
    runs: list[RunRecord],
) -> None:
    """Two tasks do not count: one run lacks piqa, and another has fewer items of sciq."""
    del runs[1].stages["tasks"].metrics["tasks"]["piqa"]
    runs[2].stages["tasks"].metrics["tasks"]["sciq"]["items"] = 100
    content = compare_runs(runs)
    assert content["tasks"] == ["arc_easy", "lambada"]
    # The scores of lambada are not fractions, so only arc_easy counts in the mean.
    score = runs[0].stages["tasks"].metrics["tasks"]["arc_easy"]["distilled"]["value"]
    assert [row.tasks["distilled"] for row in content["rows"]] == [score] * 3
    runs[1].stages["tasks"].metrics["tasks"] = {}  # no task is common to all runs
    assert [row.tasks for row in compare_runs(runs)["rows"]] == [{}] * 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit", 50),
        ("seed", 1),
        ("num_fewshot", 5),
        ("data", "hub a@b"),
        ("version", "2"),
        ("precision", "bf16-mixed"),
    ],
)
def test_scores_that_were_measured_in_another_way_are_not_compared(
    runs: list[RunRecord], name: str, value: object
) -> None:
    """The second run differs in a field of its task piqa, or in a setting of all its tasks.

    In all runs, only piqa has few-shot examples.
    """
    for run in runs:
        run.stages["tasks"].metrics["tasks"]["piqa"]["num_fewshot"] = 1
    tasks = runs[1].stages["tasks"]
    piqa = tasks.metrics["tasks"]["piqa"]
    is_task_field = name in piqa
    (piqa if is_task_field else tasks.config)[name] = value
    content = compare_runs(runs)
    assert "piqa" not in content["tasks"]
    assert "piqa" in content["other_tasks"]
    # The runs have the same number of items, so ``limit`` and ``seed`` only affect the choice of
    # examples. sciq has no examples. ``precision`` affects all tasks.
    assert ("sciq" in content["tasks"]) == (is_task_field or name in ("limit", "seed"))


def test_kl_to_different_teachers_is_not_compared(sweep: Path, tmp_path: Path) -> None:
    def compare_with(**changes: float) -> dict[str, Any]:
        """Compares two runs after changes of the second run's teacher."""
        runs = [read_run(sweep / name) for name in ("0", "1")]
        runs[1].stages["evaluate"].metrics["teacher"] |= changes
        return compare_runs(runs)

    content = compare_with()
    assert any("plot-kl-" in plot["plot"] for plot in content["plots"])
    teacher = content["teacher"]
    # The loss of the same teacher differs a little on another machine. A teacher of another size
    # is another teacher, even with the same loss.
    assert compare_with(loss=teacher.loss * (1 + 1e-6))["teacher"] is not None
    assert compare_with(parameters=2 * teacher.parameters)["teacher"] is None
    content = compare_with(loss=2.5)  # another teacher
    assert content["teacher"] is None
    assert not any("plot-kl-" in plot["plot"] for plot in content["plots"])
    render_template("compare.html.j2", content, tmp_path / "compare.html")
    assert 'id="other-teachers"' in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_a_diverged_run_is_not_the_best(runs: list[RunRecord]) -> None:
    metrics = runs[0].stages["evaluate"].metrics["distilled"]  # this run diverges
    metrics["loss"] = metrics["perplexity"] = math.nan
    runs[0] = replace(runs[0], losses=(math.nan, *runs[0].losses[1:]))
    content = compare_runs(runs)
    assert content["best"] == "sweep/1"
    assert all("nan" not in plot["plot"] for plot in content["plots"])


def test_a_run_evaluated_on_other_text_is_flagged_and_not_in_plots(page: Page, sweep: Path) -> None:
    text = " ".join(page.text.split())  # with single spaces
    assert "sweep/10: evaluated on other held-out text" in text
    plots = compare_runs([read_run(run) for run in find_runs([sweep])])["plots"]
    assert all(">4<" not in plot["plot"] for plot in plots), "sweep/10 is row 4"


def test_runs_that_share_a_data_set_have_the_same_text(tmp_path: Path) -> None:
    """The evaluation of the second run reads the data set of the first run."""
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    data = tmp_path / "a" / "prepare_data"
    shutil.rmtree(tmp_path / "b" / "prepare_data")
    request = read_request(runs[1] / "evaluate")
    replace(request, inputs={"data": InputRef(data, "dataset", "")}).write(runs[1] / "evaluate")
    first, second = map(read_run, runs)
    assert first.text_key() == second.text_key()


def test_a_run_evaluated_on_other_sequences_of_the_same_text_is_flagged(
    runs: list[RunRecord],
) -> None:
    runs[2].stages["evaluate"].metrics["sequences"] = 20  # the others have more
    assert [row.comparable for row in compare_runs(runs)["rows"]] == [True, True, False]


def test_incomplete_runs_are_listed(page: Page) -> None:
    text = " ".join(page.text.split())
    assert re.search("sweep/11: incomplete.* evaluate.* not evaluated: sweep/11", text)


def test_stages_of_the_last_plan_must_be_complete(tmp_path: Path) -> None:
    """A result with another fingerprint than the last plan's is not read.

    A stage that is only in an earlier plan is incomplete if it has been started.
    """
    run = make_run(tmp_path / "run")
    plan = read_last_plan(run)
    assert plan is not None
    LastPlan(plan.recipe, {**plan.stages, "evaluate": "0abc"}).write(run)
    record = read_run(run)
    assert record.incomplete == ("evaluate",)
    assert record.evaluation is None
    for name in ("export_gguf", "quantize"):
        Request(name, "0abc", "c", {}, {}).write(run / name)
    LastPlan(plan.recipe, {**plan.stages, "quantize": "0abc"}).write(run)
    assert read_run(run).incomplete == ("quantize",)
    (run / "export_gguf" / "work").mkdir()  # a started stage has this folder
    assert read_run(run).incomplete == ("quantize", "export_gguf")


def test_only_settings_that_differ_are_shown(page: Page) -> None:
    text = page.text
    assert "distill.lr" in text
    assert "distill.max_steps" in text
    assert {1e-3, 3e-4} <= page.numbers()
    # The first two are equal in all runs. The page never compares the others.
    for setting in ("distill.seed", "prune.target_hidden_size", "inputs", "resources"):
        assert setting not in text


def test_paired_difference_has_the_standard_error_of_the_differences() -> None:
    reference = [1.0, 2.0, 3.0, 4.0]
    # The differences 0.5, 0.5, 0.75 and 0.25 have a sample variance of 0.125 / 3.
    mean, error = paired_difference([1.5, 2.5, 3.75, 4.25], reference) or (0.0, 0.0)
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(math.sqrt(0.125 / 3 / 4))
    assert paired_difference([1.0], reference) is None  # the lengths differ


def test_nothing_to_compare_is_refused(sweep: Path, tmp_path: Path) -> None:
    cases = {
        "nothing to compare: of 1 run": [sweep / "0"],
        "nothing to compare: of 2 runs": [sweep / "0", sweep / "10"],
        "is not a directory": [tmp_path / "missing", sweep],
        "is not a run and contains none": [tmp_path],
        "needs the directories of runs": [],
        "cannot be written": [sweep, f"out={tmp_path}/no/compare.html"],
    }
    for message, arguments in cases.items():
        with pytest.raises(RecipeError, match=message):
            compare([str(argument) for argument in arguments], Console())
