"""Images of stages, mounts of paths with symbolic links, and the removal of containers."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from launch import machine
from launch.executors import container, docker
from recipes.core import stage_process
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT, stamp_files
from tests.support.launcher import write_program
from tests.support.manifests import edit_manifest
from tests.unit.conftest import SMALL_STUDENT, Complete, MakePlan, stage_named
from tests.unit.launch.conftest import DOCKER, GENERATIVE_TASK

PYTORCH_BACKEND = "stages.build_engine.backend=tensorrt_llm_pytorch"


@pytest.mark.parametrize("recipe", ["llama_width_prune", "shrink"])
def test_only_stages_that_run_tensorrt_llm_use_its_image(plan: MakePlan, recipe: str) -> None:
    """All other stages use the default image, also those that run OpenVINO."""
    engine_stages = {"build_engine", "build_teacher_engine", "measure_speed", "evaluate_served"}
    tensorrt_llm = ("engine=tensorrt_llm", PYTORCH_BACKEND, GENERATIVE_TASK)
    for engine, in_engine_image in ((("engine=openvino",), set()), (tensorrt_llm, engine_stages)):
        planned = plan(*DOCKER, *engine, "served=engine", recipe=f"recipe={recipe}")
        images = {stage.name: stage.image for stage in planned.stages}
        default_images = dict.fromkeys(images, "nemo-recipes:0.1.0")
        assert images == default_images | dict.fromkeys(
            in_engine_image, "nemo-recipes-engine:0.1.0"
        )


@pytest.mark.parametrize(
    ("cluster", "unset"),
    [("docker", "~cluster.images.tensorrt_llm"), ("slurm", "cluster.images.tensorrt_llm=null")],
)
def test_a_missing_image_of_tensorrt_llm_is_refused(
    plan: MakePlan, cluster: str, unset: str
) -> None:
    """The default image lacks TensorRT-LLM; without a check, the run would fail after training."""
    overrides = (f"cluster={cluster}", "hardware=h100", "cluster.images.default=nemo:1")
    engine = ("engine=tensorrt_llm", PYTORCH_BACKEND)
    with pytest.raises(
        RecipeError, match="build_engine, evaluate_served, measure_speed cannot run"
    ) as error:
        plan(*overrides, unset, *engine)
    assert "cluster.images.tensorrt_llm is not set" in str(error.value)
    assert "engine=null" in str(error.value)
    with pytest.raises(RecipeError, match="does not exist") as error:
        plan(*overrides, "cluster.images.tensorrt_llm=/no.sqsh", *engine)
    assert "engine=null" in str(error.value)
    # Both fixes work.
    assert plan(*overrides, unset, "engine=null")
    assert plan(*overrides, "cluster.images.tensorrt_llm=engine:1", *engine)


def test_a_missing_image_is_refused_only_if_the_docker_daemon_runs(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its daemon, docker's client fails for all images, also for those that exist."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    # ``docker version`` succeeds, as with a daemon, but ``docker image inspect`` fails.
    docker_program = write_program(tmp_path / "bin" / "docker", '[ "$1" = version ]')
    with pytest.raises(RecipeError, match=r"nemo-recipes:0\.1\.0 does not exist"):
        plan(*DOCKER)
    write_program(docker_program, "exit 1")  # as without a daemon
    assert plan(*DOCKER)


def test_suggested_fixes_work_for_slurm_without_a_gpu_profile(plan: MakePlan) -> None:
    """The default hardware profile is that of a CPU, but ``cluster=slurm`` requests GPUs."""
    slurm = ("cluster=slurm", "engine=null")
    with pytest.raises(RecipeError, match="requests GPUs") as error:
        plan(*slurm)
    # The two fixes are hardware=h100 and cluster.gpus=null. The message also quotes hardware=cpu.
    fixes = re.findall(r"(?:hardware|cluster[.]gpus)=(?!cpu)\w+", str(error.value))
    assert len(fixes) == 2
    for fix in fixes:
        assert plan(*slurm, fix)


def test_a_search_runs_in_containers_without_further_settings(plan: MakePlan) -> None:
    assert plan("cluster=docker", recipe="recipe=shrink")


def test_targets_of_links_in_a_model_path_are_mounted(
    plan: MakePlan, tmp_path: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only_mounts(path: Path) -> set[Path]:
        model = (f"model.hf_path={path}", *SMALL_STUDENT)
        [stage] = plan(*DOCKER, *model, "only=[import_hf]").stages
        mounts = container.mounts_of(stage, docker.DockerConfig())
        return {mount.path for mount in mounts if mount.read_only}

    plain = tmp_path / "plain"
    plain.symlink_to(hf_folder)
    # No file of the model is a link, so the folder that contains ``plain`` is not mounted.
    assert read_only_mounts(plain) == {plain, hf_folder}
    # The current directory is mounted, so a link in it needs no mount, but its target does.
    (work := tmp_path / "work").mkdir()
    (work / "models").symlink_to(tmp_path)
    monkeypatch.chdir(work)
    assert read_only_mounts(Path("models", name := hf_folder.name)) == {hf_folder}
    # ``stored`` is in the mounted directory, but leads to ``scratch``, a link that is not in it.
    (tmp_path / "scratch").symlink_to(tmp_path)
    (work / "stored").symlink_to(tmp_path / "scratch")
    assert read_only_mounts(Path("stored", name)) == {tmp_path / "scratch" / name, hf_folder}
    # A folder as in the hub's cache: each file in the snapshot is a relative link to a blob.
    blobs, snapshot, link = (tmp_path / name for name in ("blobs", "snapshots/a", "links/model"))
    for folder in (blobs, snapshot, link.parent):
        folder.mkdir(parents=True)
    for number, file in enumerate(hf_folder.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "loop").symlink_to("loop")  # a link to itself must not cause endless recursion
    link.symlink_to(snapshot)
    assert read_only_mounts(snapshot) == {snapshot, blobs}
    # The model's files are links, so the folder that contains ``link`` is mounted, too.
    assert read_only_mounts(link) == {snapshot, blobs, link.parent}
    assert read_only_mounts(Path("models/snapshots/a")) == {snapshot, blobs}


def test_targets_of_links_in_an_input_of_another_run_are_mounted(
    plan: MakePlan, complete: Complete, tmp_path: Path
) -> None:
    """With ``data.prefix``, the result of ``prepare_data`` has links to the user's files."""
    complete(plan(), "prepare_data")
    data = (tmp_path / "run" / "prepare_data").rename(tmp_path / "other")
    (tmp_path / "corpus").mkdir()
    (data / ARTIFACT / "data.bin").rename(tmp_path / "corpus" / "text.bin")
    (data / ARTIFACT / "data.bin").symlink_to(tmp_path / "corpus" / "text.bin")
    edit_manifest(data, files=stamp_files(data / ARTIFACT))
    other = f"stages.distill.inputs.data={data}"
    stage = stage_named(plan(*DOCKER, "skip_rules=[image]", other), "distill")
    mounts = {mount.path for mount in container.mounts_of(stage, docker.DockerConfig())}
    assert {data, tmp_path / "corpus"} <= mounts


def test_the_hub_folder_is_the_default_cache_unless_a_variable_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers mount the folders that ``hub_folders`` returns."""
    for name in machine.HUB_FOLDERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.hub_folders() == {}  # the default cache does not exist yet
    (default := tmp_path / "huggingface").mkdir()
    assert machine.hub_folders() == {"HF_HOME": str(default)}
    monkeypatch.setenv("HF_HUB_CACHE", "models")
    models = str(Path("models").absolute())
    assert machine.hub_folders() == {"HF_HOME": str(default), "HF_HUB_CACHE": models}
    monkeypatch.setenv("HF_HOME", "other")
    assert machine.hub_folders()["HF_HOME"] == str(Path("other").absolute())


def test_the_hub_folder_and_the_target_of_a_linked_folder_of_models_are_writable(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, home = tmp_path / "scratch", tmp_path / "home"
    scratch.mkdir()
    home.mkdir()
    (home / "hub").symlink_to(scratch)
    monkeypatch.setenv("HF_HOME", str(home))
    [stage, *_] = plan(*DOCKER, "skip_rules=[image]").stages
    mounts_of_stage = container.mounts_of(stage, docker.DockerConfig())
    mounts = {mount.path: mount.read_only for mount in mounts_of_stage}
    assert mounts[scratch] is mounts[home] is False


@pytest.mark.parametrize("cluster", ["docker", "slurm"])
def test_a_missing_folder_of_the_hub_is_refused(
    cluster: str, plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "missing"))
    with pytest.raises(RecipeError, match="missing is not a folder"):
        plan(f"cluster={cluster}", "hardware=h100", "skip_rules=[image]")


def test_a_stage_that_does_not_stop_is_killed_and_leaves_no_container(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake docker starts a process that outlives docker's client, as a container does.

    ``docker run`` starts ``sleep`` in its own session. Then the client ignores SIGTERM, writes the
    process ids of both to the log, and waits. ``docker rm`` kills ``sleep``.
    """
    monkeypatch.setattr(stage_process, "STOP_SECONDS", 0.1)  # instead of 40 s
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    pid_file, log = tmp_path / "pid", tmp_path / "log"
    write_pid = f"echo $! >{pid_file}"
    run = f"setsid sleep 600 & {write_pid}; trap '' TERM; echo $! $$; wait"
    remove = f"if [ -e {pid_file} ]; then kill $(cat {pid_file}); fi"
    commands = f'if [ "$1" = rm ]; then {remove}; elif [ "$1" = run ]; then {run}; fi'
    write_program(tmp_path / "bin" / "docker", commands)
    planned = plan(*DOCKER, "only=[plan]")
    [stage] = planned.stages
    stage.directory.mkdir(parents=True)
    docker.write_scripts(planned, docker.DockerConfig())

    def start_and_interrupt() -> None:
        with log.open("wb") as output, docker.start_container(stage, output):
            while not log.read_text().endswith("\n"):
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start_and_interrupt()
    container_process, client = (Path("/proc", pid) for pid in log.read_text().split())
    assert not client.exists()
    deadline = time.monotonic() + 10
    while container_process.exists():
        assert time.monotonic() < deadline, f"{container_process} still runs"
        time.sleep(0.01)
