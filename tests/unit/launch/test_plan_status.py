"""Which stages of a run in which state must run, and why."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from launch.plan import Plan
from recipes.core import versions
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT, MANIFEST, read_manifest, write_manifest
from recipes.core.versions import result_versions
from tests.support.runs import STAGES

if TYPE_CHECKING:
    from pathlib import Path

MakePlan = Callable[..., Plan]
Complete = Callable[..., None]


def todo(plan: Plan) -> dict[str, str]:
    """Stages that run, with the reason."""
    return {stage.name: stage.reason for stage in plan.todo()}


@pytest.fixture
def run(plan: MakePlan, complete: Complete, tmp_path: Path) -> Path:
    """A complete run."""
    complete(plan())
    return tmp_path / "run"


def test_new_run_starts_everything(plan: MakePlan) -> None:
    assert todo(plan()) == dict.fromkeys(STAGES, "not run yet")


@pytest.mark.usefixtures("run")
def test_complete_run_starts_nothing(plan: MakePlan) -> None:
    assert todo(plan()) == {}
    assert {stage.reason for stage in plan().stages} == {"complete"}


@pytest.mark.usefixtures("run")
def test_distill_field_reruns_distill_and_what_follows(plan: MakePlan) -> None:
    assert todo(plan("stages.distill.weight_decay=0.25")) == {
        "distill": "weight_decay 0.1 → 0.25",
        "evaluate": "input distilled changed",
        "export_hf": "input checkpoint changed",
        "report": "input distilled changed",
    }


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.hf_path=HF", STAGES),
        ("stages.prepare_data.max_documents=5", STAGES[2:]),
        ("stages.prune.target_hidden_size=448", ["plan", *STAGES[4:]]),
        ("stages.evaluate.num_sequences=2", ["plan", "evaluate", "export_hf", "report"]),
        ("stages.export_hf.recipe=x", ["export_hf", "report"]),
        ("stages.report.title=x", ["report"]),
    ],
)
@pytest.mark.usefixtures("run")
def test_a_field_reruns_its_stage_and_what_follows(
    plan: MakePlan, hf_folder: Path, override: str, expected: list[str]
) -> None:
    extra = []
    if override.endswith("=HF"):
        override = override.replace("HF", str(hf_folder))
        # The small model needs smaller targets.
        extra = ["stages.prune.target_hidden_size=64", "stages.prune.target_ffn_hidden_size=128"]
    assert list(todo(plan(override, *extra))) == expected


@pytest.mark.parametrize(
    "override",
    [
        "stages.distill.resources.devices=4 stages.distill.micro_batch_size=4",
        "+stages.prune.resources.env.X=y",
        "+cluster.env.X=y",
        "dry_run=true",
    ],
)
@pytest.mark.usefixtures("run")
def test_resources_rerun_nothing(plan: MakePlan, complete: Complete, override: str) -> None:
    overrides = override.split()
    if "devices" in override:  # A batch that both layouts can take.
        complete(plan("stages.distill.global_batch_size=16"))
        overrides.append("stages.distill.global_batch_size=16")
    found = todo(plan(*overrides))
    assert found.keys() <= {"plan", "report"}  # which is of the layout as well
    assert bool(found) == ("devices" in override)


@pytest.mark.usefixtures("run")
def test_several_changed_fields_are_counted(plan: MakePlan) -> None:
    overrides = ("stages.distill.lr=2e-4", "stages.distill.max_steps=70", "stages.distill.seed=1")
    assert todo(plan(*overrides))["distill"].endswith(" and 2 more")


@pytest.mark.usefixtures("run")
def test_a_change_is_named_in_a_few_words(plan: MakePlan) -> None:
    steps = todo(plan("stages.distill.max_steps=70"))
    assert re.fullmatch(r"workloads\.distill\.steps \d+ → 70", steps["plan"])
    sources = [f"/a/folder/with/a/name/part{n}.jsonl" for n in range(9)]
    override = f"stages.prepare_data.sources={json.dumps(sources)}"
    changed = plan(override, "skip_rules=[data-sources]")
    assert todo(changed)["prepare_data"] == "sources changed"


def test_changed_code_is_the_reason(plan: MakePlan, run: Path) -> None:
    manifest = read_manifest(run / "prune")
    assert manifest is not None
    write_manifest(run / "prune", dataclasses.replace(manifest, code="old", fingerprint="old"))
    assert todo(plan()) == {
        "prune": "code changed",
        "distill": "after prune",
        "evaluate": "after prune, distill",
        "export_hf": "after distill, evaluate, prune",
        "report": "after prune, distill, evaluate, export_hf",
    }


@pytest.mark.usefixtures("run")
def test_another_version_of_a_library_is_the_reason(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = result_versions()
    changed = {**before, "transformers": "9.0", "numpy": "9.0"}
    monkeypatch.setattr(versions, "installed", changed.get)
    reason = f"version of transformers ({before['transformers']} → 9.0) changed"
    assert todo(plan("skip_rules=[stack-versions]"))["import_hf"] == reason
    monkeypatch.setattr(versions, "installed", {**before, "numpy": "9.0"}.get)
    assert todo(plan("skip_rules=[stack-versions]")) == {}


def test_changed_data_file_is_the_reason(
    plan: MakePlan, complete: Complete, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one " * 1000)
    complete(plan(f"data.sources=[{file}]"))
    os.utime(file, ns=(0, 0))
    assert todo(plan(f"data.sources=[{file}]")) == {}
    file.write_text("two " * 1000)
    found = todo(plan(f"data.sources=[{file}]"))
    assert found["prepare_data"] == "source files changed"
    assert found["score"] == "input calibration changed"
    assert "import_hf" not in found


def test_changed_model_folder_is_the_reason(
    plan: MakePlan, complete: Complete, hf_folder: Path
) -> None:
    overrides = (
        f"model.hf_path={hf_folder}",
        "stages.prune.target_hidden_size=64",
        "stages.prune.target_ffn_hidden_size=128",
    )
    complete(plan(*overrides))
    assert todo(plan(*overrides)) == {}
    (hf_folder / "LICENSE").write_text("another")
    found = todo(plan(*overrides))
    assert list(found) == STAGES[1:]
    assert found["import_hf"] == "source files changed"


@pytest.mark.usefixtures("run")
def test_forced_stage_runs_with_what_follows(plan: MakePlan) -> None:
    assert todo(plan("force=[distill]")) == {
        "distill": "forced",
        "evaluate": "after distill",
        "export_hf": "after distill, evaluate",
        "report": "after distill, evaluate, export_hf",
    }


@pytest.mark.usefixtures("run")
def test_forced_stages_may_be_several(plan: MakePlan) -> None:
    found = todo(plan("force=[evaluate,report]"))
    assert list(found) == ["evaluate", "export_hf", "report"]
    assert found["report"] == "forced"


def test_deleted_manifest_reruns_the_stage_and_what_follows(plan: MakePlan, run: Path) -> None:
    (run / "evaluate" / MANIFEST).unlink()
    assert todo(plan()) == {
        "evaluate": "not run yet",
        "export_hf": "after evaluate",
        "report": "after evaluate, export_hf",
    }


@pytest.mark.parametrize("change", ["edit", "delete", "add"])
def test_changed_artifact_is_refused_by_name(plan: MakePlan, run: Path, change: str) -> None:
    artifact = run / "prune" / ARTIFACT
    if change == "edit":
        (artifact / "data.bin").write_text("edited")
    elif change == "delete":
        (artifact / "data.bin").unlink()
    else:
        (artifact / "new.bin").write_text("")
    with pytest.raises(RecipeError, match="does not match its manifest") as caught:
        plan()
    assert str(artifact) in str(caught.value)
    assert ("new.bin (added)" if change == "add" else "data.bin") in str(caught.value)
    assert todo(plan("force=[prune]"))["prune"] == "forced"


def test_touched_artifact_is_complete(plan: MakePlan, run: Path) -> None:
    os.utime(run / "prune" / ARTIFACT / "data.bin", ns=(0, 0))
    assert todo(plan()) == {}


def test_broken_manifest_is_refused_by_name(plan: MakePlan, run: Path) -> None:
    (run / "distill" / MANIFEST).write_text("{")
    with pytest.raises(RecipeError, match="is not a readable manifest") as caught:
        plan()
    assert str(run / "distill" / MANIFEST) in str(caught.value)


@pytest.mark.usefixtures("run")
def test_rerun_that_made_another_result_reruns_what_follows(
    plan: MakePlan, complete: Complete
) -> None:
    """As ``only=[distill] force=[distill]`` leaves it, or a forced run killed after it."""
    complete(plan(), "distill", content="another result")
    assert list(todo(plan())) == ["evaluate", "export_hf", "report"]


def test_runs_do_not_depend_on_where_they_are(plan: MakePlan, run: Path, tmp_path: Path) -> None:
    before = {stage.name: stage.fingerprint for stage in plan().stages}
    run.rename(tmp_path / "moved")
    assert todo(plan()) == dict.fromkeys(STAGES, "not run yet")
    (tmp_path / "moved").rename(run)
    assert todo(plan()) == {}
    assert {stage.name: stage.fingerprint for stage in plan().stages} == before
