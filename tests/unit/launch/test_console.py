"""Tests the printed tables of plans and results, and the progress of a running stage."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from launch.console import headline, print_plan, print_recipes, print_sources, print_summary
from launch.planned import PlannedStage
from launch.progress import LINE_SECONDS, Follower
from recipes.core.metrics import METRICS, MetricsLog
from tests.support.manifests import bare_manifest
from tests.support.results import RESULTS
from tests.support.text import write_token_files
from tests.unit.conftest import Complete, MakePlan, stage_named


@pytest.fixture
def screen() -> Console:
    """A console that writes to a string, without a terminal."""
    return Console(file=StringIO(), width=200, highlight=False, soft_wrap=True)


def text_of(screen: Console) -> str:
    """Returns all text that was written to the console."""
    assert isinstance(screen.file, StringIO)
    return screen.file.getvalue()


def lines_of(screen: Console, word: str = "") -> list[str]:
    """Returns the written lines that contain ``word``; by default all."""
    return [line for line in text_of(screen).splitlines() if word in line]


def test_recipes_are_listed_with_their_descriptions(screen: Console) -> None:
    print_recipes({"one": "the first", "two": "the second"}, screen)
    # The first line is the title.
    assert [line.split() for line in lines_of(screen)[1:3]] == [
        ["one", "the", "first"],
        ["two", "the", "second"],
    ]
    assert "python launch/run.py recipe=NAME" in text_of(screen)


def test_plan_shows_action_and_reason(screen: Console, plan: MakePlan, complete: Complete) -> None:
    complete(plan())
    print_plan(plan("stages.distill.weight_decay=0.25", "stages.report.title='a [draft]'"), screen)
    rows = (line.split() for line in lines_of(screen)[2:])  # after the title and the headings
    words_by_stage = {row[0]: row[1:] for row in rows}
    assert words_by_stage["prune"] == ["skip", "complete"]
    assert words_by_stage["distill"] == ["run", "weight_decay", "0.1", "→", "0.25"]
    assert "a [draft]" in text_of(screen)  # the brackets are not markup


def test_plan_shows_the_gates_that_apply(screen: Console, plan: MakePlan) -> None:
    print_plan(plan('gates=["recovered >= 0.9","perplexity < 50"]'), screen)
    assert "gates: recovered >= 0.9, perplexity < 50" in lines_of(screen)
    # Without tasks=full, gates on benchmarks do not apply.
    print_plan(plan('task_gates=["score.mmlu >= 0.5"]'), screen)
    assert "gates: none" in lines_of(screen)


def test_sources_are_shown_and_tokenized_text_is_not_compared_with_benchmarks(
    screen: Console, plan: MakePlan, tmp_path: Path
) -> None:
    """Benchmark items can be found in text, but not in tokens."""
    prefix = write_token_files(tmp_path / "corpus")
    for name in ("a", "b"):  # together 72,000 characters: 18,000 tokens of 4 characters
        (tmp_path / f"{name}.md").write_text("text " * 7200)
    files = f"data.sources=['{tmp_path}/*.md#name=pages&licence=MIT']"
    print_sources(plan(files, "stages.distill.max_steps=50"), screen)
    [row] = lines_of(screen, "pages")
    assert " ".join(row.split()) == "pages training 2 documents, about 18,000 tokens MIT"
    chats = "data.sources=['teacher://chat#tokens=1000']"
    print_sources(plan(chats, "stages.distill.max_steps=50"), screen)
    assert "about 1,000 tokens" in text_of(screen)
    assert "not compared" not in text_of(screen)
    no_sources = ("data.sources=[]", "data.heldout_sources=[]")
    print_sources(plan(*no_sources, f"data.prefix={prefix}", "skip_rules=[tokens]"), screen)
    assert re.search("corpus: .* benchmarks", lines_of(screen)[-1])


def test_summary_shows_the_results_of_stages(
    screen: Console, plan: MakePlan, complete: Complete
) -> None:
    planned = plan("heal=least_squares", "engine=openvino")
    print_summary(planned, 1.0, screen)
    assert text_of(screen).count("incomplete") == len(planned.stages)
    complete(planned)
    print_summary(plan("heal=least_squares", "engine=openvino"), 1.25, screen)
    summary = text_of(screen)
    for text in (
        *("897,123 tokens", "86.5 M parameters", "1.0 GB", "report.html", "openvino int8"),
        "KL 0.680 → 0.415 on validation text",
        "1.38 × prefill, 1.31 × decode (transformers, batch 1)",
        "everything was complete, nothing ran; 1.2 s",
    ):
        assert text in summary
    assert summary.count("skipped") == len(planned.stages)


def test_headline_of_an_evaluation_shows_perplexities_and_recovered_loss() -> None:
    evaluation = bare_manifest("evaluate", "eval_results", RESULTS["evaluate"])
    for recovered, suffix in (
        (0.75, ", recovered 75% of the loss added by pruning"),
        (0.0, ", recovered 0% of the loss added by pruning"),
        (None, ""),
    ):
        evaluation.metrics["recovered"] = recovered
        assert headline(evaluation) == f"perplexity 20.5 → 938.0 → 45.3{suffix}"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The follower's clock. ``clock[0]`` is the time in seconds, which only the test advances."""
    now = [100.0]
    monkeypatch.setattr("launch.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def stage(plan: MakePlan, clock: list[float]) -> PlannedStage:
    """The distillation of a plan. Its directory is empty."""
    stage = stage_named(plan(), "distill")
    stage.directory.mkdir(parents=True)
    return stage


@pytest.fixture
def log(stage: PlannedStage) -> MetricsLog:
    """The metrics file of ``stage``."""
    return MetricsLog(stage.directory / METRICS)


def steps_shown(screen: Console) -> list[str]:
    """Returns ``STEP/TOTAL`` of each printed line of the task ``train``."""
    return [line.split()[2] for line in lines_of(screen, "train")]


def test_follower_prints_start_progress_and_end(
    screen: Console, stage: PlannedStage, log: MetricsLog
) -> None:
    with Follower(stage, screen) as follower:
        follower.update()
        log.progress("train", 1, 1, loss=2.34567, other=1)  # ``other`` is not shown
        follower.update()
        follower.update()  # prints nothing, because there is no new record
    lines = ["distill: started", "distill: train 1/1  loss 2.346", "distill: complete in 0 s"]
    assert lines_of(screen) == lines
    with pytest.raises(ValueError, match="x"), Follower(stage, screen):
        raise ValueError("x")
    assert lines_of(screen) == [*lines, "distill: started"], "a failed stage is not complete"


@pytest.mark.parametrize("terminal", [False, True])
def test_follower_shows_the_time_left_of_stage_and_run(
    stage: PlannedStage,
    log: MetricsLog,
    clock: list[float],
    terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step takes 10 seconds. The later stages of the run take an hour."""
    monkeypatch.setenv("TERM", "xterm")  # rich shows no bar in a dumb terminal
    screen = Console(file=StringIO(), width=200, force_terminal=terminal, highlight=False)
    with Follower(stage, screen, run_estimate=lambda seconds: seconds + 3600) as follower:
        for step in (1, 2, 5):
            clock[0] += 2 * LINE_SECONDS  # so each record is printed
            log.log(time=10.0 * step, task="train", done=step, total=5, loss=2.5)
            follower.update()
    if terminal:
        # The bar's last frame is at step 5 of 5.
        assert "about 1:00:00 for the run loss 2.5" in text_of(screen)
    else:  # without the lines of the start and the end
        assert lines_of(screen)[1:-1] == [
            "distill: train 1/5  loss 2.5",
            "distill: train 2/5, 0:00:30 left, about 1:00:30 for the run  loss 2.5",
            "distill: train 5/5, about 1:00:00 for the run  loss 2.5",
        ]


def test_follower_prints_a_line_every_few_seconds(
    screen: Console, stage: PlannedStage, log: MetricsLog, clock: list[float]
) -> None:
    with Follower(stage, screen) as follower:
        for step in range(1, 51):
            clock[0] += LINE_SECONDS / 20
            log.progress("train", step, 50)
            follower.update()
    # After 20 steps, exactly LINE_SECONDS have passed, so the next line comes after 21. The last
    # step is always shown.
    assert steps_shown(screen) == ["1/50", "22/50", "43/50", "50/50"]


def test_follower_waits_for_the_rest_of_a_line(screen: Console, stage: PlannedStage) -> None:
    line = json.dumps({"task": "train", "done": 3, "total": 3}) + "\n"
    with Follower(stage, screen) as follower, (stage.directory / METRICS).open("a") as file:
        for fragment in (line[:10], line[10:]):
            assert steps_shown(screen) == []  # also after the first fragment
            file.write(fragment)
            file.flush()
            follower.update()
    assert steps_shown(screen) == ["3/3"]


@pytest.mark.parametrize(
    "old_text", ['{"task": "train", "done": 1, "total": 1}\n', '{"task": "tra']
)
def test_follower_skips_records_of_an_earlier_start(
    screen: Console, stage: PlannedStage, log: MetricsLog, old_text: str
) -> None:
    """A kill may have truncated the last old record."""
    (stage.directory / METRICS).write_text(old_text)
    with Follower(stage, screen) as follower:
        log.progress("train", 2, 2)
        follower.update()
    assert steps_shown(screen) == ["2/2"]


@pytest.mark.parametrize("steps", [(7,), (7, 8, 9)], ids=["shorter", "longer"])
def test_follower_reads_a_replaced_metrics_file_from_its_start(
    screen: Console, stage: PlannedStage, steps: tuple[int, ...]
) -> None:
    file: Path = stage.directory / METRICS
    # The old file is longer than one new record, and shorter than three new records.
    file.write_text('{"note": "longer than one of the new records"}\n' + "{}\n" * 33)
    with Follower(stage, screen) as follower:
        file.unlink()
        follower.update()
        log = MetricsLog(file)
        for step in steps:
            log.progress("train", step, step)
        follower.update()
    assert steps_shown(screen) == [f"{step}/{step}" for step in steps]
