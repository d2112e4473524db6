"""Stages and inputs of plans, and refused plans.

``test_plan_status`` tests which stages a plan runs, resumes or skips.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from launch.plan import make_plan
from launch.settings import settings_of
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT, MANIFEST, read_manifest
from recipes.distillation.results import CacheResult
from recipes.stages import score
from tests.support.manifests import edit_manifest
from tests.support.runs import STAGES
from tests.unit.conftest import stage_named

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.conftest import Complete, Compose, MakePlan


def planning_error(plan: MakePlan, *overrides: str) -> str:
    """Returns the message of the error that a plan with these overrides raises."""
    with pytest.raises(RecipeError) as caught:
        plan(*overrides)
    return str(caught.value)


def test_stages_are_in_the_order_of_their_inputs(plan: MakePlan) -> None:
    """Each input is the result of an earlier stage."""
    stages = plan().stages
    assert [stage.name for stage in stages] == STAGES
    for index, stage in enumerate(stages):
        assert {*stage.config.inputs.values()} <= {*STAGES[:index]}


def test_planning_writes_nothing_and_gives_equal_plans(plan: MakePlan, tmp_path: Path) -> None:
    first, second = plan(), plan()
    assert first == second
    assert len({stage.fingerprint for stage in first.stages}) == len(STAGES)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("force=[distil]", "force: there is no stage 'distil'. Did you mean 'distill'?"),
        ("only=[prun]", "only: there is no stage 'prun'. Did you mean 'prune'?"),
        ("stages.distill.stage=distil", "no kind of stage 'distil'"),
        ("stages.prune.inputs.checkpoint=prune", "in a circle"),
        ("stages.prune.inputs.checkpoint=distill", "in a circle: prune → distill → prune"),
        (
            "stages.prune.inputs.checkpoint=prepare_data",
            "is a dataset; a checkpoint_nemo is needed",
        ),
        ("stages.prune.inputs.checkpoint=improt_hf", "Did you mean 'import_hf'?"),
        ("+stages.prune.inputs.extra=import_hf", "prune needs checkpoint, importance"),
        ("~stages.prune.inputs.importance", "prune needs checkpoint, importance"),
        ("model.hf_path=/nowhere/at/all", "neither a folder nor a Hugging Face hub id"),
        ("model.hf_path=null", "no model is set"),
        ("model.hf_path=''", "no model is set"),
    ],
)
def test_problem_is_found_before_anything_runs(
    plan: MakePlan, tmp_path: Path, override: str, expected: str
) -> None:
    assert expected in planning_error(plan, override)
    assert not (tmp_path / "run").exists()


def test_problems_of_several_stages_are_listed_together(plan: MakePlan) -> None:
    message = planning_error(
        plan,
        "data.sources=[]",
        "stages.prune.target_hidden_size=640",  # the teacher has 576
        "data.seq_length=9000",  # the teacher supports 8192
    )
    for expected in ("data.sources is empty", "larger than the teacher", "9000"):
        assert expected in message


def test_recipe_without_stages_is_refused(compose: Compose, tmp_path: Path) -> None:
    cfg = compose()
    with pytest.raises(RecipeError, match="the recipe has no stages"):
        make_plan(cfg, settings_of(cfg), tmp_path)


def test_a_model_without_weights_is_refused(plan: MakePlan, hf_folder: Path) -> None:
    (hf_folder / "model.safetensors").unlink()
    message = planning_error(plan, f"model.hf_path={hf_folder}")
    assert "hf_model has neither model.safetensors nor" in message


@pytest.mark.parametrize("name", ["only", "force"])
def test_one_name_is_accepted_instead_of_a_list(plan: MakePlan, name: str) -> None:
    assert plan(f"{name}=import_hf") == plan(f"{name}=[import_hf]")


def test_selected_stages_need_complete_inputs(plan: MakePlan, complete: Complete) -> None:
    message = planning_error(plan, "only=[prune]")
    for expected in ("excludes import_hf", "not run yet", "add import_hf to only"):
        assert expected in message
    complete(plan(), "import_hf", "prepare_data", "score")
    # Other settings of prune do not affect its inputs.
    planned = plan("only=[prune]", "stages.prune.target_hidden_size=448")
    assert [(stage.name, stage.action) for stage in planned.stages] == [("prune", "run")]
    complete(plan())
    message = planning_error(plan, "only=[distill]", "stages.prune.target_hidden_size=448")
    assert "excludes prune" in message
    assert "target_hidden_size 512 → 448" in message  # the complete result of prune has 512


def test_unselected_stages_are_ignored(plan: MakePlan, complete: Complete, tmp_path: Path) -> None:
    # The size is invalid: the teacher has 576.
    planned = plan("only=[import_hf]", "stages.prune.target_hidden_size=640")
    assert [stage.name for stage in planned.stages] == ["import_hf"]
    complete(plan())
    # The edited result of report is not valid any more, but ``only`` excludes report.
    (tmp_path / "run" / "report" / ARTIFACT / "data.bin").write_text("edited")
    assert plan("only=[prune]").todo() == []


def test_input_may_come_from_another_run(
    plan: MakePlan, complete: Complete, tmp_path: Path
) -> None:
    complete(plan())
    other = (tmp_path / "run").rename(tmp_path / "other")
    checkpoint = f"stages.prune.inputs.checkpoint={other}/import_hf"
    input_ref = stage_named(plan(checkpoint), "prune").inputs["checkpoint"]
    manifest = json.loads((other / "import_hf" / MANIFEST).read_text())
    assert input_ref.directory == other / "import_hf"
    assert input_ref.fingerprint == manifest["fingerprint"]
    with_heal = plan(checkpoint, "heal=least_squares")
    assert stage_named(with_heal, "heal").inputs["teacher"] == input_ref  # the unpruned model


def test_input_may_have_several_types(
    plan: MakePlan, complete: Complete, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Normally this input has only the type ``dataset``.
    monkeypatch.setitem(score.STAGE.inputs, "calibration", ("dataset", "checkpoint_nemo"))  # type: ignore[arg-type]

    def calibration_kind(*overrides: str) -> str:
        """Returns the artifact type of the input ``calibration`` in a plan."""
        return stage_named(plan(*overrides), "score").inputs["calibration"].kind

    assert calibration_kind() == "dataset"
    assert calibration_kind("stages.score.inputs.calibration=import_hf") == "checkpoint_nemo"
    complete(plan())
    (tmp_path / "run").rename(tmp_path / "other")
    other = f"stages.score.inputs.calibration={tmp_path}/other"
    assert calibration_kind(f"{other}/import_hf") == "checkpoint_nemo"
    message = planning_error(plan, f"{other}/report")
    assert "other/report is a report; a dataset or checkpoint_nemo is needed" in message


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        ("served=gguf", "set gguf=f16 or gguf=q8_0"),
        ("served=engine", "set engine=openvino or engine=tensorrt_llm"),
        ("engine=openvino stages.build_engine.precision=bf16", "int4, or engine=tensorrt_llm ("),
        ("engine=openvino stages.build_engine.precision=int4_awq", "engine=tensorrt_llm_quantized"),
        ("long_context=32k", "fix: leave long_context out"),
        ("data.seq_length=16384", "data.seq_length to at most 8192   [seq-length]"),
        ("data.prefix=x", "fix: data.sources=[]   [data-sources]"),
    ],
)
def test_a_fix_names_settings_that_help(plan: MakePlan, overrides: str, fix: str) -> None:
    assert fix in planning_error(plan, *overrides.split())


@pytest.mark.parametrize(
    ("stage_dir", "damage", "expected"),
    [
        ("prepare_data", None, "is a dataset; a checkpoint_nemo is needed"),
        ("import_hf", "manifest", "has no manifest.json: it is not complete"),
        ("import_hf", "file", "data.bin (changed)"),
        ("nothing", None, "neither a stage of this recipe nor a stage directory"),
        (".", None, "has no manifest.json"),
    ],
)
def test_input_that_cannot_be_used_is_refused(
    plan: MakePlan,
    complete: Complete,
    tmp_path: Path,
    stage_dir: str,
    damage: str | None,
    expected: str,
) -> None:
    """Prune needs a checkpoint. ``damage`` is what the test removes or edits in the directory."""
    complete(plan(), "import_hf", "prepare_data")
    directory = (tmp_path / "run").rename(tmp_path / "other") / stage_dir
    if damage == "manifest":
        (directory / MANIFEST).unlink()
    elif damage == "file":
        (directory / ARTIFACT / "data.bin").write_text("edited")
    message = planning_error(plan, f"stages.prune.inputs.checkpoint={directory}")
    assert expected in message
    assert str(directory.resolve()) in message


def test_workload_has_the_shapes_of_models_from_another_run(
    plan: MakePlan, complete: Complete, tmp_path: Path
) -> None:
    """The manifests of the other run describe the student, and whether the teacher is cached."""
    complete(plan())
    other = (tmp_path / "run").rename(tmp_path / "other")
    shape = plan().chain.workloads["distill"].trained
    assert shape is not None
    # 7 layers: a number that no stage of this recipe would give.
    edit_manifest(other / "prune", architecture={**shape.as_dict(), "num_layers": 7})
    student_input = f"stages.distill.inputs.student={other}/prune"
    workload = plan(student_input).chain.workloads["distill"]
    assert workload.trained is not None
    assert workload.trained.num_layers == 7
    assert workload.teacher is not None
    teacher_manifest = read_manifest(other / "import_hf")
    assert teacher_manifest is not None
    # Make the result of import_hf look like a cache of the teacher's logits.
    cache_config = {"seq_length": 256, "temperature": 1.0, "top_k": 64, "tail_draws": 0}
    cache_config |= {"seed": 1234, "weights": {}}
    result = CacheResult(
        sequences=4000,
        sequences_of_text=4000,
        tokens=0,
        bytes_per_token=0,
        teacher_loss=0.0,
        tail_mass=0.0,
    )
    edit_manifest(
        other / "import_hf",
        kind="logit_cache",
        stage="cache_logits",
        config=teacher_manifest.config | cache_config,
        metrics=asdict(result),
    )
    cached = plan(student_input, f"stages.distill.inputs.teacher={other}/import_hf")
    assert cached.chain.workloads["distill"].teacher is None, "cached logits replace the teacher"


def test_a_model_card_has_the_measurements_of_the_exported_model(plan: MakePlan) -> None:
    """``evaluate`` measures the model that ``export_hf`` exports, unless its input is set."""
    stages = plan("stages.export_hf.inputs.checkpoint=prune").chain.stages
    assert stages["evaluate"].inputs["distilled"] == "prune"
    message = "export_hf exports distill, but its model card would have the measurements of prune"
    assert message in planning_error(plan, "stages.evaluate.inputs.distilled=prune")
