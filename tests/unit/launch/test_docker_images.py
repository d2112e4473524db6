"""The container image of each stage, its mounts of links, and the end of a container."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launch import machine
from launch.executors import container, docker
from recipes.core import stage_process
from recipes.core.errors import RecipeError
from tests.support.launcher import write_program
from tests.unit.conftest import SMALL_STUDENT

if TYPE_CHECKING:
    from tests.unit.conftest import MakePlan

DOCKER = ("cluster=docker", "hardware=h100")
PYTORCH = "stages.build_engine.backend=tensorrt_llm_pytorch"
GENERATIVE_TASK = "stages.evaluate_served.tasks=[gsm8k_cot]"
ENGINE_OVERRIDES = {"openvino": (), "tensorrt_llm": (PYTORCH, GENERATIVE_TASK)}


@pytest.mark.parametrize("recipe", ["llama_width_prune", "shrink"])
def test_images_are_chosen_by_what_a_stage_runs(plan: MakePlan, recipe: str) -> None:
    """Stages that run TensorRT-LLM use its image; all others, also OpenVINO's, the default one."""
    engines = {"build_engine", "build_teacher_engine", "measure_speed", "evaluate_served"}
    for engine in ENGINE_OVERRIDES:
        overrides = (*DOCKER, f"engine={engine}", "served=engine", *ENGINE_OVERRIDES[engine])
        planned = plan(*overrides, recipe=f"recipe={recipe}")
        in_engine_image = {s.name for s in planned.stages if s.image == "nemo-recipes-engine:0.1.0"}
        assert in_engine_image == (engines if engine == "tensorrt_llm" else set())
        assert {s.image for s in planned.stages if s.name not in in_engine_image} == {
            "nemo-recipes:0.1.0"
        }


@pytest.mark.parametrize(("cluster", "unset"), [("docker", "~{}"), ("slurm", "{}=null")])
def test_a_missing_image_of_tensorrt_llm_is_refused(
    plan: MakePlan, cluster: str, unset: str
) -> None:
    """The default image lacks TensorRT-LLM; without a check, the run would fail after training."""
    overrides = (f"cluster={cluster}", "hardware=h100", "cluster.images.default=nemo:1")
    unset = unset.format("cluster.images.tensorrt_llm")
    engine = ("engine=tensorrt_llm", PYTORCH)
    with pytest.raises(
        RecipeError, match="build_engine, evaluate_served, measure_speed cannot run"
    ) as error:
        plan(*overrides, unset, *engine)
    assert "cluster.images.tensorrt_llm is not set" in str(error.value)
    assert "engine=null" in str(error.value)
    with pytest.raises(RecipeError, match="does not exist") as error:
        plan(*overrides, "cluster.images.tensorrt_llm=/no.sqsh", *engine)
    assert "engine=null" in str(error.value)
    assert plan(*overrides, unset, "engine=null")
    assert plan(*overrides, "cluster.images.tensorrt_llm=engine:1", *engine)


def test_a_missing_image_is_refused_only_if_docker_answers(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its daemon, the client of a real docker also fails for images that exist."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    docker_program = write_program(tmp_path / "bin" / "docker", '[ "$1" = version ]')
    with pytest.raises(RecipeError, match=r"nemo-recipes:0\.1\.0 does not exist"):
        plan(*DOCKER)
    write_program(docker_program, "exit 1")
    assert plan(*DOCKER)


def test_the_fixes_for_slurm_without_hardware_make_it_run(plan: MakePlan) -> None:
    """The default profile is that of a CPU, but ``cluster=slurm`` requests GPUs."""
    slurm = ("cluster=slurm", "engine=null")
    with pytest.raises(RecipeError, match="requests GPUs") as error:
        plan(*slurm)
    fixes = re.findall(r"(?:hardware|cluster[.]gpus)=(?!cpu)\w+", str(error.value))
    assert len(fixes) == 2
    for fix in fixes:
        assert plan(*slurm, fix)


@pytest.mark.parametrize("recipe", ["llama_width_prune", "shrink"])
def test_recipes_run_in_containers_without_further_settings(plan: MakePlan, recipe: str) -> None:
    assert plan("cluster=docker", recipe=f"recipe={recipe}")


def test_folders_to_which_links_of_a_model_lead_are_mounted(
    plan: MakePlan, tmp_path: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub's cache has links to ``blobs``; the user may have made a link to the model's folder.

    A link may also be in a folder that is mounted, such as the current directory.
    """

    def read_only(path: Path) -> set[Path]:
        model = (f"model.hf_path={path}", *SMALL_STUDENT)
        [stage] = plan(*DOCKER, *model, "only=[import_hf]").stages
        mounts = container.mounts_of(stage, docker.DockerConfig())
        return {mount.path for mount in mounts if mount.read_only}

    plain = tmp_path / "plain"
    plain.symlink_to(hf_folder)
    assert read_only(plain) == {plain, hf_folder}  # and not the whole folder that has the link
    (work := tmp_path / "work").mkdir()
    (work / "models").symlink_to(tmp_path)
    monkeypatch.chdir(work)
    assert read_only(Path("models/hf_model")) == {hf_folder}
    (tmp_path / "scratch").symlink_to(tmp_path)
    (work / "stored").symlink_to(tmp_path / "scratch")  # a link to a link
    assert read_only(Path("stored/hf_model")) == {tmp_path / "scratch/hf_model", hf_folder}
    blobs, snapshot, link = (tmp_path / name for name in ("blobs", "snapshots/a", "links/model"))
    for folder in (blobs, snapshot, link.parent):
        folder.mkdir(parents=True)
    for number, file in enumerate(hf_folder.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "loop").symlink_to("loop")
    link.symlink_to(snapshot)
    assert read_only(snapshot) == {snapshot, blobs}
    assert read_only(link) == {snapshot, blobs, link.parent}
    assert read_only(Path("models/snapshots/a")) == {snapshot, blobs}


def test_the_default_cache_of_the_hub_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in machine.HUB_FOLDERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.hub_folders() == {}
    (default := tmp_path / "huggingface").mkdir()
    assert machine.hub_folders() == {"HF_HOME": str(default)}
    monkeypatch.setenv("HF_HUB_CACHE", str(default))
    assert machine.hub_folders() == {"HF_HUB_CACHE": str(default)}


@pytest.mark.parametrize("cluster", ["docker", "slurm"])
def test_a_missing_folder_of_the_hub_is_refused(
    cluster: str, plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "missing"))
    with pytest.raises(RecipeError, match="missing is not a folder"):
        plan(f"cluster={cluster}", "hardware=h100", "skip_rules=[image]")


def test_a_stopped_stage_leaves_no_container(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake docker starts a process that outlives its client, as a container does."""
    monkeypatch.setattr(stage_process, "STOP_SECONDS", 0.1)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    pid = tmp_path / "pid"
    run = f"setsid sleep 600 & echo $! >{pid}.new; mv {pid}.new {pid}; trap '' TERM; wait"
    remove = f"if [ -e {pid} ]; then kill $(cat {pid}); fi"
    commands = f'if [ "$1" = rm ]; then {remove}; elif [ "$1" = run ]; then {run}; fi'
    write_program(tmp_path / "bin" / "docker", commands)
    planned = plan(*DOCKER, "only=[plan]")
    [stage] = planned.stages
    stage.directory.mkdir(parents=True)
    docker.write_scripts(planned, docker.DockerConfig())

    def start_and_interrupt() -> None:
        with (tmp_path / "log").open("wb") as log, docker.start_container(stage, log):
            while not pid.exists():
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start_and_interrupt()
    deadline = time.monotonic() + 10
    while (process := Path("/proc", pid.read_text().strip())).exists():
        assert time.monotonic() < deadline, f"{process} still runs"
        time.sleep(0.01)
