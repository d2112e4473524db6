from __future__ import annotations

import json
from io import StringIO
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from launch.console import (
    headline,
    print_plan,
    print_recipes,
    print_summary,
)
from launch.progress import LINE_SECONDS, Follower
from recipes.core.manifest import Manifest, read_manifest
from recipes.core.metrics import METRICS, MetricsLog

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from launch.plan import Plan
    from launch.planned import PlannedStage


@pytest.fixture
def screen() -> Console:
    """What is printed where there is no terminal."""
    return Console(file=StringIO(), width=200, highlight=False, soft_wrap=True)


@pytest.fixture
def stage(plan: Callable[..., Plan]) -> PlannedStage:
    stage = next(s for s in plan().stages if s.name == "distill")
    stage.directory.mkdir(parents=True)
    return stage


def text_of(screen: Console) -> str:
    assert isinstance(screen.file, StringIO)
    return screen.file.getvalue()


def lines_of(screen: Console) -> list[str]:
    return text_of(screen).splitlines()


def test_recipes_are_listed_with_their_descriptions(screen: Console) -> None:
    print_recipes({"one": "the first", "two": "the second"}, screen)
    assert [line.split() for line in lines_of(screen)[1:3]] == [
        ["one", "the", "first"],
        ["two", "the", "second"],
    ]
    assert "python launch/run.py recipe=NAME" in text_of(screen)


def test_plan_shows_action_and_reason(
    screen: Console, plan: Callable[..., Plan], complete: Callable[..., None]
) -> None:
    complete(plan())
    print_plan(plan("stages.distill.weight_decay=0.25"), screen)
    shown = {line.split()[0]: line.split()[1:] for line in lines_of(screen)[2:]}
    assert shown["prune"] == ["skip", "complete"]
    assert shown["distill"] == ["run", "weight_decay", "0.1", "→", "0.25"]


def test_plan_shows_brackets_as_they_are(
    screen: Console, plan: Callable[..., Plan], complete: Callable[..., None]
) -> None:
    complete(plan())
    print_plan(plan("stages.report.title='a [draft] title'"), screen)
    assert "a [draft] title" in text_of(screen)


def test_summary_shows_what_each_stage_produced(
    screen: Console, plan: Callable[..., Plan], complete: Callable[..., None]
) -> None:
    chosen = ("heal=least_squares", "engine=openvino")
    complete(plan(*chosen))
    print_summary(plan(*chosen), 1.25, screen)
    shown = text_of(screen)
    for words in (
        "897,123 tokens",
        "86.5 M parameters",
        "1.0 GB",
        "report.html",
        "recovered 79% of",
    ):
        assert words in shown
    assert "everything was complete, nothing ran; 1.2 s" in shown
    for words in (
        "openvino int8",
        "KL 0.680 → 0.415 on validation text",
        "1.38 × prefill, 1.31 × decode (transformers, batch 1)",
    ):
        assert words in shown
    assert shown.count("skipped") == len(plan(*chosen).stages)


def test_summary_marks_incomplete_stages(screen: Console, plan: Callable[..., Plan]) -> None:
    print_summary(plan(), 1.0, screen)
    assert text_of(screen).count("incomplete") == len(plan().stages)


@pytest.mark.parametrize(
    ("recovered", "expected"),
    [
        (0.75, "perplexity 20.5 → 938.0 → 45.3, recovered 75% of the loss added by pruning"),
        (None, "perplexity 20.5 → 938.0 → 45.3"),
        pytest.param(
            0.0, "perplexity 20.5 → 938.0 → 45.3, recovered 0% of the loss added by pruning"
        ),
    ],
)
def test_headline_of_an_evaluation(
    plan: Callable[..., Plan],
    complete: Callable[..., None],
    recovered: float | None,
    expected: str,
) -> None:
    complete(plan())
    evaluation: Manifest | None = read_manifest(plan().run_dir / "evaluate")
    assert evaluation is not None
    evaluation.metrics["recovered"] = recovered
    assert headline(evaluation) == expected


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The follower's time, which stands until it is set."""
    now = [100.0]
    monkeypatch.setattr("launch.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def records(follower: Follower, stage: PlannedStage, *steps: int, **values: Any) -> None:
    log = MetricsLog(stage.directory / METRICS)
    for step in steps:
        log.progress("train", step, step, **values)
    follower.update()


def test_follower_prints_start_progress_and_end(screen: Console, stage: PlannedStage) -> None:
    with Follower(stage, screen) as follower:
        follower.update()
        records(follower, stage, 1, loss=2.34567, other=1)
        follower.update()
    assert lines_of(screen) == [
        "distill: started",
        "distill: train 1/1  loss 2.346",
        "distill: complete in 0 s",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_follower_says_how_long_stage_and_run_will_take(
    stage: PlannedStage, clock: list[float], terminal: bool
) -> None:
    screen = Console(file=StringIO(), width=200, force_terminal=terminal, highlight=False)
    log = MetricsLog(stage.directory / METRICS)
    with Follower(stage, screen, run_estimate=lambda left: left + 3600) as follower:
        for step in (1, 2, 5):
            clock[0] += 2 * LINE_SECONDS
            log.log(time=10.0 * step, task="train", done=step, total=5, loss=2.5)
            follower.update()
    if terminal:
        assert "about 1:00:00 of the run loss 2.5" in text_of(screen)  # in its last frame
    else:
        assert lines_of(screen)[1:-1] == [
            "distill: train 1/5  loss 2.5",
            "distill: train 2/5, 0:00:30 left, about 1:00:30 of the run  loss 2.5",
            "distill: train 5/5, about 1:00:00 of the run  loss 2.5",
        ]


def test_follower_does_not_call_a_failed_stage_complete(
    screen: Console, stage: PlannedStage
) -> None:
    with pytest.raises(ValueError, match="x"), Follower(stage, screen):
        raise ValueError("x")
    assert lines_of(screen) == ["distill: started"]


def test_follower_holds_back_unfinished_work(
    screen: Console, stage: PlannedStage, clock: list[float]
) -> None:
    log = MetricsLog(stage.directory / METRICS)
    with Follower(stage, screen) as follower:
        for step in range(1, 51):
            clock[0] += LINE_SECONDS / 20
            log.progress("train", step, 50)
            follower.update()
    shown = [line.split()[2] for line in lines_of(screen) if "train" in line]
    assert shown == ["1/50", "22/50", "43/50", "50/50"]


def test_follower_waits_for_the_rest_of_a_line(screen: Console, stage: PlannedStage) -> None:
    line = json.dumps({"task": "train", "done": 3, "total": 3}) + "\n"
    with Follower(stage, screen) as follower, (stage.directory / METRICS).open("a") as file:
        for part in (line[:10], line[10:]):
            assert "train" not in text_of(screen)
            file.write(part)
            file.flush()
            follower.update()
    assert text_of(screen).count("train 3/3") == 1


def test_follower_passes_over_records_of_an_interrupted_run(
    screen: Console, stage: PlannedStage
) -> None:
    MetricsLog(stage.directory / METRICS).progress("train", 1, 1)
    with Follower(stage, screen) as follower:
        records(follower, stage, 2)
    assert [line for line in lines_of(screen) if "train" in line] == ["distill: train 2/2"]


def test_follower_passes_over_the_end_of_a_record_that_was_cut(
    screen: Console, stage: PlannedStage
) -> None:
    file: Path = stage.directory / METRICS
    file.write_text('{"task": "train", "do')
    with Follower(stage, screen) as follower:
        records(follower, stage, 2)  # which ends that line first
    assert [line for line in lines_of(screen) if "train" in line] == ["distill: train 2/2"]


@pytest.mark.parametrize(
    "again",
    [
        pytest.param((7,), id="shorter"),
        pytest.param((7, 8, 9), id="longer"),
    ],
)
def test_follower_reads_a_new_file_from_its_start(
    screen: Console, stage: PlannedStage, again: tuple[int, ...]
) -> None:
    file: Path = stage.directory / METRICS
    file.write_text('{"note": "longer than one of the new records"}\n' + "{}\n" * 33)
    with Follower(stage, screen) as follower:
        file.unlink()
        follower.update()
        records(follower, stage, *again)
    shown = [line.split()[2] for line in lines_of(screen) if "train" in line]
    assert shown == [f"{step}/{step}" for step in again]
