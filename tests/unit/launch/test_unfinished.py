"""Unfinished work is resumed or started over, or the plan is refused."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from launch import lock
from launch.run import run as start_run
from recipes.core.errors import RecipeError
from recipes.core.manifest import MANIFEST, WORK, read_manifest, write_manifest
from recipes.core.run_state import BEGUN, begin_work
from recipes.data.corpus import TOKEN_BYTES
from recipes.stages.prepare_data import MIN_PROGRESS_TOKENS
from tests.support.manifests import unfinished_manifest
from tests.unit.conftest import RECIPE, complete_overrides, stage_named

if TYPE_CHECKING:
    from pathlib import Path

    from launch.plan import Plan
    from tests.unit.conftest import Complete, Compose, Launch, MakePlan

SEARCH, ROUND = "recipe=llama_search", "candidates/a/round-0"
RESUME_RULE = "(it resumes only with the settings, inputs and code that it was started with)."
"""End of the message of a refused plan."""


def interrupt(plan: Plan, name: str, *, checkpoint: bool = True) -> None:
    """Writes the unfinished work of a stage that was killed.

    Args:
        plan: A plan with the settings that the stage was started with.
        name: Name of the stage.
        checkpoint: Whether the work has a checkpoint, of step 50 (its name counts from 0).
    """
    stage = stage_named(plan, name)
    manifest = unfinished_manifest(stage.request())
    begin_work(stage.directory, manifest)
    stage.request().write(stage.directory)
    # begin_work omits the hashes of inputs. A started stage adds them.
    write_manifest(stage.directory / WORK, manifest, BEGUN)
    if checkpoint:
        (stage.directory / WORK / "checkpoints" / "step=49-last").mkdir(parents=True)


def actions_of(plan: Plan) -> dict[str, tuple[str, str]]:
    """Returns the action and its reason for each stage that is not skipped."""
    return {stage.name: (stage.action, stage.reason) for stage in plan.todo()}


def refusal(plan: MakePlan, *overrides: str) -> list[str]:
    """Plans with these overrides, expects an error, and returns its message and its fix."""
    with pytest.raises(RecipeError) as caught:
        plan(*overrides)
    return str(caught.value).split("\n  fix: ")


def test_interrupted_stages_without_progress_start_anew(plan: MakePlan) -> None:
    """The training run has no checkpoint yet, and the evaluation never records progress."""
    interrupt(plan(), "distill", checkpoint=False)
    interrupt(plan(), "evaluate")
    actions = actions_of(plan("stages.distill.seed=1", "stages.evaluate.num_sequences=2"))
    assert actions["distill"] == actions["evaluate"] == ("run", "not run yet")


def test_progress_is_not_lost_to_a_changed_field(plan: MakePlan) -> None:
    interrupt(plan(), "distill")
    message, fix = refusal(plan, "stages.distill.global_batch_size=8")
    change = "global_batch_size changed 4 → 8"
    assert message == f"distill was interrupted at step 50, and since then {change} {RESUME_RULE}"
    assert fix == (
        "set stages.distill.global_batch_size=4 to resume, or force=[distill] to start over"
    )
    # Only a launcher that runs distill changes the error.
    with lock.acquire(plan().run_dir) as set_stage:
        set_stage("evaluate")
        assert refusal(plan, "stages.distill.global_batch_size=8") == [message, fix]
        set_stage("distill")
        message, fix_while_running = refusal(plan, "stages.distill.global_batch_size=8")
    assert message.startswith(f"distill is running, at step 50, and since its start {change}")
    assert "cancel run_dir=" in fix_while_running
    old_size = fix.split()[1]  # stages.distill.global_batch_size=4; the last override counts
    resumed = plan("stages.distill.global_batch_size=8", old_size)
    assert actions_of(resumed)["distill"][0] == "resume"
    forced = plan("stages.distill.global_batch_size=8", "force=[distill]")
    assert actions_of(forced)["distill"] == ("run", "forced")


def test_pipeline_size_that_changes_the_loss_on_hidden_states_prevents_resumption(
    plan: MakePlan,
) -> None:
    """By default, ``hidden_pipeline_stages`` equals the pipeline size."""
    hidden_loss = "stages.distill.hidden_weight=1"
    stage_settings = ("pipeline_model_parallel_size=2", "resources.devices=2")
    two_stages = [f"stages.distill.{setting}" for setting in stage_settings]
    interrupt(plan(hidden_loss), "distill")
    assert "hidden_pipeline_stages changed 1 → 2" in refusal(plan, hidden_loss, *two_stages)[0]
    # A value of 1 compares all layers, but two pipeline stages allow only those of the last stage.
    name = "stages.distill.hidden_pipeline_stages"
    assert "student's layers [1, 2" in refusal(plan, hidden_loss, *two_stages, f"{name}=1")[0]
    interrupt(plan(hidden_loss, *two_stages, "force=[distill]"), "distill")
    assert "changed 2 → 1" in refusal(plan, hidden_loss)[0]
    assert actions_of(plan(hidden_loss, f"{name}=2"))["distill"][0] == "resume"


def test_dry_run_is_refused_like_the_real_run(
    plan: MakePlan, launch: Launch, tmp_path: Path
) -> None:
    interrupt(plan(), "distill")
    run = tmp_path / "run"
    command = "recipe=llama_width_prune", f"run_dir={run}", "dry_run=true", "stages.distill.seed=1"
    process = launch(*command)
    assert process.returncode == 1
    assert process.stderr.startswith(
        "error: distill was interrupted at step 50, and since then seed"
    )
    assert [path.name for path in run.iterdir()] == ["distill"], "the dry run wrote nothing"
    assert launch(*command, "force=[distill]").returncode == 0
    assert list(run.glob("distill/work/checkpoints/*"))  # a dry run deletes no work


def test_error_names_every_changed_field_and_the_old_values(plan: MakePlan) -> None:
    overrides = ("stages.distill.precision=32", "stages.distill.lr=3e-4")
    interrupt(plan(*overrides), "distill")
    message, fix = refusal(
        plan,
        "stages.distill.lr=1e-5",
        "stages.distill.min_lr=1e-6",
        "stages.distill.precision=bf16-mixed",
    )
    assert "min_lr changed 3e-05 → 1e-06" in message
    assert "lr changed 0.0003 → 1e-05" in message
    assert "precision changed 32 → bf16-mixed" in message
    # The fix is "set OVERRIDE ... to resume, or ...".
    old_values = shlex.split(fix.removeprefix("set ").partition(" to resume")[0])
    assert sorted(old_values) == [
        "stages.distill.lr=0.0003",
        "stages.distill.min_lr=3e-05",
        "stages.distill.precision=32",
    ]
    assert actions_of(plan(*old_values))["distill"][0] == "resume"


def test_progress_is_not_lost_to_changed_inputs_or_code(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(plan(), "distill")
    message, fix = refusal(plan, "stages.prune.target_hidden_size=448")
    assert f"since then its input student changed {RESUME_RULE}" in message
    # prune has no result that accept could keep.
    assert fix == "undo that to resume, or force=[distill] to start over"
    message, _ = refusal(plan, "stages.prune.target_hidden_size=448", "stages.distill.seed=1")
    assert "since then seed changed 1234 → 1, its input student changed (" in message
    monkeypatch.setattr("recipes.core.run_state.stage_code", lambda _: "new")
    message, _ = refusal(plan)
    assert "since then its input teacher changed, its input student changed" in message
    assert "its code changed" in message


def test_progress_is_not_lost_to_an_input_that_was_computed_again(
    plan: MakePlan, complete: Complete, tmp_path: Path
) -> None:
    """The new result of ``prune`` has the old fingerprint, but its content may differ."""
    complete(plan())
    (tmp_path / "run" / "distill" / MANIFEST).unlink()
    interrupt(plan(), "distill")
    complete(plan(), "prune")  # the same content as before
    actions = actions_of(plan())
    assert actions["distill"] == ("resume", "was interrupted")
    assert actions["evaluate"] == ("run", "after distill")
    complete(plan(), "prune", content="another result")
    assert "since then its input student changed" in refusal(plan)[0]
    assert actions_of(plan("force=[distill]"))["distill"] == ("run", "forced")
    # The content of a result that will be computed again is not known yet.
    action, reason = actions_of(plan("force=[prune]"))["distill"]
    assert action == "resume"
    assert "prune" in reason


def test_parallel_layout_may_change_between_interruption_and_resumption(plan: MakePlan) -> None:
    interrupt(plan(), "distill")
    layout = "stages.distill.resources.devices=2", "stages.distill.micro_batch_size=2"
    assert actions_of(plan(*layout))["distill"][0] == "resume"
    message, fix = refusal(plan, *layout, "stages.distill.seed=1")
    assert message.count("changed") == 1, "only seed is named, not the layout"
    assert fix.startswith("set stages.distill.seed=1234 to resume")


@pytest.mark.parametrize(
    ("stage", "file", "setting", "progress"),
    [
        ("prepare_data", "splits/train.bin", "max_documents=7", "10,000,000 tokens"),
        ("successive_halving", f"{ROUND}/manifest.json", "distill.lr=1", "1 training"),
        ("successive_halving", f"{ROUND}/work/checkpoints/1", "distill.lr=1", "an unfinished"),
    ],
)
def test_progress_of_text_and_of_searches_is_not_lost(
    plan: MakePlan, stage: str, file: str, setting: str, progress: str
) -> None:
    """Text counts as progress from ``MIN_PROGRESS_TOKENS``, a search from one checkpoint."""

    def planned(*overrides: str) -> Plan:
        return plan("stages.enumerate_shapes.budget.parameters=0.9", *overrides, recipe=SEARCH)

    interrupt(planned(), stage, checkpoint=False)
    changed = f"stages.{stage}.{setting}"
    assert actions_of(planned(changed))[stage] == ("run", "not run yet")
    path = stage_named(planned(), stage).directory / WORK / file
    path.parent.mkdir(parents=True)
    path.touch()
    os.truncate(path, TOKEN_BYTES * MIN_PROGRESS_TOKENS - 1)  # one byte too few
    if stage == "prepare_data":
        assert actions_of(planned(changed))[stage] == ("run", "not run yet")
    os.truncate(path, TOKEN_BYTES * MIN_PROGRESS_TOKENS)
    name, value = setting.split("=")
    pattern = rf"{stage} was interrupted at {progress}.* since then {name} changed \S+ → {value}"
    with pytest.raises(RecipeError, match=rf"{pattern}\S* \(it"):
        planned(changed)
    assert actions_of(planned())[stage][0] == "resume"


def test_settings_that_keep_a_training_running_may_change(plan: MakePlan) -> None:
    """Errors about non-finite gradients and about a full disk advise to change these settings."""
    interrupt(plan(), "distill")
    settings = ("max_nonfinite_steps=1", "keep_checkpoints=1", "checkpoint_interval=10")
    assert actions_of(plan(*(f"stages.distill.{s}" for s in settings)))["distill"][0] == "resume"


def test_needed_disk_space_excludes_what_unfinished_work_has(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan()
    needed = {s.name: s.definition.disk_bytes(s.config, planned.chain) for s in planned.todo()}
    # The disk lacks half of what distill needs. Unfinished work then provides two thirds.
    usage = SimpleNamespace(free=sum(needed.values()) - needed["distill"] // 2)
    monkeypatch.setattr("launch.plan.shutil.disk_usage", lambda path: usage)
    assert "are free" in refusal(plan)[0]
    interrupt(planned, "distill")
    folder = stage_named(planned, "distill").directory / WORK / "checkpoints" / "step=49-last"
    with (folder / "weights").open("wb") as file:
        file.truncate(needed["distill"] * 2 // 3)  # a sparse file
    walk = os.walk
    # Adds a file that does not exist to each folder: a job may delete files meanwhile.
    monkeypatch.setattr(os, "walk", lambda path: ((p, d, [*f, "gone"]) for p, d, f in walk(path)))
    assert actions_of(plan())["distill"][0] == "resume"


def test_unfinished_work_is_compared_with_its_own_start_and_not_with_a_later_config_file(
    plan: MakePlan,
) -> None:
    """A dry run with ``force``, or a run that fails before distill, overwrites ``config.yaml``."""
    interrupt(plan(), "distill")
    stage = stage_named(plan("stages.distill.seed=1", "force=[distill]"), "distill")
    stage.request().write(stage.directory)  # config.yaml
    assert "seed changed 1234 → 1" in refusal(plan, "stages.distill.seed=1")[0]
    assert actions_of(plan())["distill"][0] == "resume"


def test_unfinished_reruns_of_complete_or_unselected_stages_are_ignored(
    plan: MakePlan, complete: Complete
) -> None:
    """``distill`` has a result with the default seed, and unfinished work with seed 1."""
    complete(plan())
    interrupt(plan("stages.distill.seed=1"), "distill")
    assert actions_of(plan()) == {}
    assert actions_of(plan("stages.distill.seed=1"))["distill"] == ("resume", "was interrupted")
    assert actions_of(plan("only=[prune]", "stages.distill.seed=2")) == {}
    assert "seed changed 1 → 2" in refusal(plan, "stages.distill.seed=2")[0]


def test_killed_forced_runs_are_resumed_by_the_same_command(
    plan: MakePlan, complete: Complete
) -> None:
    """Without ``force``, a complete result is used instead of the unfinished work."""
    interrupt(plan(), "distill")
    interrupt(plan("stages.distill.seed=1", "force=[distill]"), "distill")
    assert actions_of(plan("stages.distill.seed=1"))["distill"][0] == "resume"
    assert actions_of(plan("stages.distill.seed=1", "force=[distill]"))["distill"][0] == "resume"
    assert "seed changed 1 → 1234" in refusal(plan)[0]
    complete(plan("force=[distill]"))
    interrupt(plan("force=[distill]"), "distill")
    assert actions_of(plan("force=[distill]"))["distill"] == ("resume", "was interrupted")
    assert actions_of(plan()) == {}


@pytest.mark.parametrize("content", ["result", "another result"])
def test_repeated_command_forces_a_stage_only_once(
    plan: MakePlan,
    compose: Compose,
    complete: Complete,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
) -> None:
    """If a stage after the forced stage fails, the repeated command skips the forced stage.

    Once the whole command is complete, ``force`` counts again. If the content of the forced stage's
    new result differs from the old content, "result", the later stages run again, too.
    """
    run_dir = tmp_path / "run"
    complete(plan())
    stages_to_complete = ["distill"]

    def start(*_: object) -> None:
        """Replaces the local executor: completes some stages, then fails."""
        for name in stages_to_complete:
            complete(plan(), name, content=content)
            manifest = read_manifest(run_dir / name)
            assert manifest is not None
            started_at = datetime.now(UTC).isoformat(timespec="microseconds")
            write_manifest(run_dir / name, replace(manifest, started_at=started_at, seconds=2.0))
        raise RecipeError("the next stage failed", "")

    def run_forced(*only: str) -> None:
        overrides = ("force=[distill]", f"run_dir={run_dir}", *only)
        cfg = compose(*complete_overrides(RECIPE, overrides))
        start_run(cfg, "llama_width_prune")

    monkeypatch.setattr("launch.executors.local.start", start)
    with pytest.raises(RecipeError, match="next stage failed"):
        run_forced()
    later_stages = [] if content == "result" else ["evaluate", "export_hf", "report"]
    [skipped] = plan("force=[distill]", "only=[distill]").stages
    assert (skipped.action, skipped.reason) == ("skip", "already replaced by force")
    run_forced("only=[distill]")
    assert list(actions_of(plan("force=[distill]"))) == later_stages
    # The limit of 4e-4 device-hours is 1.4 seconds. The result of distill took 2 seconds, but needs
    # no confirmation: force names this stage.
    both_forced = plan("force=[prune,distill]", "confirm_above=4e-4")
    assert actions_of(both_forced)["distill"] == ("run", "after prune")
    stages_to_complete[:] = later_stages
    if later_stages:
        with pytest.raises(RecipeError, match="next stage failed"):
            run_forced()
    else:
        run_forced()
    assert actions_of(plan("force=[distill]"))["distill"] == ("run", "forced")
