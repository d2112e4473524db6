"""Which stages a plan runs, and the reason that it shows for each."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING

import pytest

from recipes.core import versions
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT, MANIFEST
from recipes.core.versions import result_versions
from tests.support.manifests import edit_manifest
from tests.support.runs import STAGES
from tests.unit.conftest import SMALL_STUDENT, stage_named

if TYPE_CHECKING:
    from pathlib import Path

    from launch.plan import Plan
    from tests.unit.conftest import Complete, MakePlan


def reasons_to_run(plan: Plan) -> dict[str, str]:
    """Returns the stages that must run, each with its reason."""
    return {stage.name: stage.reason for stage in plan.todo()}


@pytest.fixture
def run(plan: MakePlan, complete: Complete, tmp_path: Path) -> Path:
    """The directory of a complete run of the default recipe."""
    complete(plan())
    return tmp_path / "run"


def test_only_incomplete_stages_run(plan: MakePlan, run: Path, tmp_path: Path) -> None:
    """The run is moved away and back."""
    complete = plan()
    assert {(stage.action, stage.reason) for stage in complete.stages} == {("skip", "complete")}
    run.rename(tmp_path / "moved")
    assert reasons_to_run(plan()) == dict.fromkeys(STAGES, "not run yet")
    (tmp_path / "moved").rename(run)
    assert plan() == complete


@pytest.mark.parametrize(
    ("override", "expected"),
    [  # STAGES[2:] starts with prepare_data, STAGES[4:] with prune. HF: the fixture ``hf_folder``.
        ("model.hf_path=HF", STAGES),
        ("stages.prepare_data.max_documents=5", STAGES[2:]),
        ("stages.prune.target_hidden_size=448", ["plan", *STAGES[4:]]),
        ("stages.evaluate.num_sequences=2", ["plan", "evaluate", "export_hf", "report"]),
        ("stages.export_hf.recipe=x", ["export_hf", "report"]),
        ("stages.report.title=x", ["report"]),
    ],
)
@pytest.mark.usefixtures("run")
def test_a_changed_field_reruns_its_stage_and_all_later_ones(
    plan: MakePlan, hf_folder: Path, override: str, expected: list[str]
) -> None:
    student_sizes = SMALL_STUDENT if override.endswith("=HF") else ()
    planned = plan(override.replace("=HF", f"={hf_folder}"), *student_sizes)
    assert list(reasons_to_run(planned)) == expected


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
def test_resources_rerun_only_plan_and_report(
    plan: MakePlan, complete: Complete, override: str
) -> None:
    overrides = override.split()
    if "devices" in override:
        # 4 devices × micro batch 4: the global batch size must be a multiple of 16. One device
        # supports 16, too.
        complete(plan("stages.distill.global_batch_size=16"))
        overrides.append("stages.distill.global_batch_size=16")
    reasons = reasons_to_run(plan(*overrides))
    assert reasons.keys() <= {"plan", "report"}  # both show the number of devices
    changes_devices = "devices" in override  # the other overrides make no stage run
    assert bool(reasons) == changes_devices


@pytest.mark.usefixtures("run")
def test_reasons_say_what_changed(plan: MakePlan) -> None:
    assert reasons_to_run(plan("stages.distill.weight_decay=0.25")) == {
        "distill": "weight_decay 0.1 → 0.25",
        "evaluate": "input distilled changed",
        "export_hf": "input checkpoint changed",
        "report": "input distilled changed",
    }
    three_changes = (
        "stages.distill.lr=2e-4",
        "stages.distill.max_steps=70",
        "stages.distill.seed=1",
    )
    reasons = reasons_to_run(plan(*three_changes))
    assert reasons["distill"].endswith(" and 2 more")
    assert re.fullmatch(r"workloads\.distill\.steps \d+ → 70.*", reasons["plan"])
    # A reason omits values that are too long for it. The files do not exist, so a rule is skipped.
    sources = json.dumps([f"/a/folder/with/a/name/part{n}.jsonl" for n in range(9)])
    many_sources = plan(f"stages.prepare_data.sources={sources}", "skip_rules=[data-sources]")
    assert reasons_to_run(many_sources)["prepare_data"] == "sources changed"


def test_changed_code_or_a_deleted_manifest_is_a_reason_to_run(plan: MakePlan, run: Path) -> None:
    edit_manifest(run / "prune", code="old", fingerprint="old")
    assert reasons_to_run(plan()) == {
        "prune": "code changed",
        "distill": "after prune",
        "evaluate": "after prune, distill",
        "export_hf": "after distill, evaluate",
        "report": "after prune, distill, evaluate, export_hf",
    }
    (run / "prune" / MANIFEST).unlink()
    assert reasons_to_run(plan())["prune"] == "not run yet"


@pytest.mark.usefixtures("run")
def test_another_version_of_a_library_is_a_reason_to_run(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = result_versions()
    for library, old in recorded.items():
        installed = {**recorded, library: "9.0"}
        monkeypatch.setattr(versions, "installed_version", installed.get)
        # The skipped rule compares the versions with those that pyproject.toml allows.
        reasons = reasons_to_run(plan("skip_rules=[stack-versions]"))
        assert reasons["import_hf"] == f"version of {library} ({old} → 9.0) changed"
        assert "distill" in reasons
    # Results stay valid if every other package has another version.
    monkeypatch.setattr(versions, "installed_version", lambda name: recorded.get(name, "9.0"))
    assert reasons_to_run(plan("skip_rules=[stack-versions]")) == {}


def test_versions_of_engines_are_part_of_the_fingerprints_of_stages_that_use_them(
    plan: MakePlan, complete: Complete, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("engine=openvino", "gguf=q8_0", "served=gguf", "skip_rules=[stack-versions]")
    complete(plan(*options))
    # Another version of NNCF, which only the stages of the engine use.
    original = versions.installed_version
    monkeypatch.setattr(
        versions, "installed_version", lambda name: "9" if name == "nncf" else original(name)
    )
    reasons = reasons_to_run(plan(*options))
    assert "version of nncf" in reasons["build_engine"]
    assert {"distill", "evaluate", "export_gguf"}.isdisjoint(reasons)
    monkeypatch.setattr(versions, "installed_version", original)
    assert reasons_to_run(plan(*options)) == {}
    # A new llama-server, which only ``evaluate_served`` uses. Its version is "1 (abc)".
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho found 2 GPUs\necho 'version: 1 (abc)' >&2\necho built")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    versions.program_version.cache_clear()
    reasons = reasons_to_run(plan(*options))
    versions.program_version.cache_clear()
    assert "version of llama-server (unknown → 1 (abc))" in reasons["evaluate_served"]
    assert "build_engine" not in reasons


def test_another_image_is_no_reason_to_run(plan: MakePlan, complete: Complete) -> None:
    docker = ("cluster=docker", "cluster.gpus=null", "skip_rules=[image]")
    complete(plan(*docker))
    assert reasons_to_run(plan(*docker, "+cluster.images.distill=other:1")) == {}
    assert reasons_to_run(plan()) == {}, "without an image"


def test_other_spellings_of_paths_and_files_that_no_stage_reads_are_no_reason_to_run(
    plan: MakePlan, complete: Complete, tmp_path: Path, hf_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = (f"model.hf_path={hf_folder}", *SMALL_STUDENT)
    complete(plan(*model))
    (tmp_path / "run").rename(tmp_path / "other")
    # The run gets an input from the complete run ``other``. Both paths are absolute here.
    calibration = "stages.score.inputs.calibration"
    complete(plan(*model, f"{calibration}={tmp_path}/other/prepare_data"))
    monkeypatch.chdir(tmp_path)  # relative paths are relative to this directory
    (hf_folder / ".cache" / "huggingface").mkdir(parents=True)
    (hf_folder / ".cache" / "huggingface" / "etag").write_text("hf download adds such files")
    for hf_path in ("hf_model", f"{hf_folder}/"):
        relative_input = f"{calibration}=other/prepare_data/"
        planned = plan(f"model.hf_path={hf_path}", *SMALL_STUDENT, relative_input)
        assert reasons_to_run(planned) == {}
        # ``hub.push`` publishes the settings of the export. So they keep the user's spelling
        # instead of an absolute path.
        assert stage_named(planned, "export_hf").request().config["teacher"] == hf_path


def test_changed_source_files_are_a_reason_to_run(
    plan: MakePlan, complete: Complete, tmp_path: Path, hf_folder: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one " * 1000)
    overrides = (f"data.sources=[{file}]", f"model.hf_path={hf_folder}", *SMALL_STUDENT)
    complete(plan(*overrides))
    os.utime(file, ns=(0, 0))  # another modification time, but the same content
    assert reasons_to_run(plan(*overrides)) == {}
    file.write_text("two " * 1000)  # other content of the same size
    reasons = reasons_to_run(plan(*overrides))
    assert reasons["prepare_data"] == "files from outside the run changed"
    assert reasons["score"] == "input calibration changed"
    assert "import_hf" not in reasons
    (hf_folder / "weights").mkdir()
    (hf_folder / "weights" / "shard.safetensors").touch()
    assert "import_hf" in reasons_to_run(plan(*overrides))
    complete(plan(*overrides))
    (hf_folder / "LICENSE").write_text("another")
    reasons = reasons_to_run(plan(*overrides))
    assert list(reasons) == STAGES[1:]  # all stages but ``plan``
    assert reasons["import_hf"] == "files from outside the run changed"


@pytest.mark.usefixtures("run")
def test_forced_stages_run_with_all_later_ones(plan: MakePlan) -> None:
    assert reasons_to_run(plan("force=[distill]")) == {
        "distill": "forced",
        "evaluate": "after distill",
        "export_hf": "after distill, evaluate",
        "report": "after distill, evaluate, export_hf",
    }
    assert reasons_to_run(plan("force=[evaluate,report]")) == {
        "evaluate": "forced",
        "export_hf": "after evaluate",
        "report": "forced",
    }


@pytest.mark.parametrize("change", ["edit", "delete", "add"])
def test_changed_artifact_is_refused_with_the_names_of_its_files(
    plan: MakePlan, run: Path, change: str
) -> None:
    artifact = run / "prune" / ARTIFACT
    os.utime(artifact / "data.bin", ns=(0, 0))
    assert reasons_to_run(plan()) == {}, "a new modification time is not a change"
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
    assert reasons_to_run(plan("force=[prune]"))["prune"] == "forced"


def test_broken_manifest_is_refused_with_its_path(plan: MakePlan, run: Path) -> None:
    (run / "distill" / MANIFEST).write_text("{")
    with pytest.raises(RecipeError, match=r"distill/manifest\.json is not a readable manifest"):
        plan()


@pytest.mark.usefixtures("run")
def test_other_content_with_the_same_fingerprint_reruns_later_stages(
    plan: MakePlan, complete: Complete
) -> None:
    """This happens after ``only=[distill] force=[distill]``, or if a forced run is killed."""
    complete(plan(), "distill", content="another result")
    reasons = reasons_to_run(plan())
    assert list(reasons) == ["evaluate", "export_hf", "report"]
    assert reasons["evaluate"] == "input distilled was replaced"
