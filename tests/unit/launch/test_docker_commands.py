"""The ``docker run`` command of a stage, and the paths that it mounts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launch.executors import container, docker, local
from recipes.core.errors import RecipeError
from recipes.core.wheels import cache_dir
from tests.support.launcher import write_program
from tests.support.text import write_token_files
from tests.unit.conftest import SMALL_STUDENT, Complete, MakePlan, stage_named
from tests.unit.launch.conftest import DOCKER, Prepare


def test_docker_command_has_exactly_these_options(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_group = 4300  # an arbitrary group of the user, in addition to the primary one
    monkeypatch.setattr(os, "getgroups", lambda: [os.getgid(), other_group])
    planned, cluster = prepare(
        *DOCKER,
        'cluster.options=["--network=host"]',
        f"cluster.mounts=[{tmp_path}/cache:ro,/usr/share:ro]",
        "stages.distill.resources.devices=4",
        "stages.distill.global_batch_size=16",
        "+stages.distill.resources.env.NCCL_DEBUG=INFO",
        "+cluster.env.OMP_NUM_THREADS='8'",
        "+cluster.images.distill=special:1",
    )
    # The default of ``pass_env`` in conf/cluster/docker.yaml.
    assert {"HF_HUB_OFFLINE", "TRUST_CHECKPOINTS"} <= set(cluster.pass_env)
    stage = stage_named(planned, "distill")
    arguments = [arg for group in docker.command(stage, cluster) for arg in group]
    cache = f"{tmp_path}/cache"
    # The option of each mount, by path. The cache is writable although ``mounts`` has ``cache:ro``.
    mount_options = {path: "" for path in (cache, f"{tmp_path}/home", f"{tmp_path}/run")}
    mount_options["/usr/share"] = ":ro"
    assert arguments == [
        *("docker", "run", "--rm", f"--name={docker.container_name(stage)}", "--gpus=all"),
        *("--init", "--ipc=host", "--ulimit=memlock=-1", "--ulimit=stack=67108864"),
        *(f"--user={os.getuid()}:{os.getgid()}", f"--group-add={other_group}"),
        f"--workdir={tmp_path}/home",
        *(f"--volume={path}:{path}{mount_options[path]}" for path in sorted(mount_options)),
        *("--env=OMP_NUM_THREADS=8", "--env=STAGE_NEEDS_GPU=h100"),
        *("--env=TOKENIZERS_PARALLELISM=false", "--env=NCCL_DEBUG=INFO"),
        *(f"--env=PYTHONPATH={stage.code_dir}", "--env=PYTHONSAFEPATH=1"),
        *(f"--env=HOME={cache}", "--env=USER=nemo-recipes", "--env=TMPDIR=/tmp"),
        f"--env=TORCHINDUCTOR_CACHE_DIR={cache}/torchinductor",
        "--env=TORCH_EXTENSIONS_DIR=/tmp/torch_extensions_dir",
        "--env=TRITON_CACHE_DIR=/tmp/triton_cache_dir",
        f"--env=NEMO_RECIPES_CACHE={cache}",
        *(f"--env={name}" for name in cluster.pass_env),
        *("--network=host", "special:1"),
        *("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"),
        *("-m", "recipes.core.worker", "recipes.stages.distill"),
        f"{tmp_path}/run/distill/config.yaml",
    ]
    # ``images.distill`` does not affect other stages: they run in the default image.
    assert ["nemo-recipes:0.1.0"] in docker.command(stage_named(planned, "prune"), cluster)


def test_a_passed_variable_does_not_replace_the_path_of_the_code(prepare: Prepare) -> None:
    planned, cluster = prepare(*DOCKER, "cluster.pass_env=[PYTHONPATH,MY_TOKEN]")
    options = [arg for group in docker.command(planned.stages[0], cluster) for arg in group]
    assert "--env=MY_TOKEN" in options
    assert "--env=PYTHONPATH" not in options


def test_docker_script_starts_the_command(prepare: Prepare, tmp_path: Path) -> None:
    """Runs the real script with a fake docker that only records its arguments.

    ``AWKWARD`` has characters that the script must quote.
    """
    planned, cluster = prepare(*DOCKER, "+cluster.env.AWKWARD='it is \"$HOME\"'")
    stage = stage_named(planned, "prune")
    write_program(tmp_path / "bin" / "docker", f'printf "%s\\n" "$@" >>{tmp_path}/arguments')
    docker.write_scripts(planned, cluster)
    subprocess.run([stage.directory / local.SCRIPT], check=True, cwd="/")
    arguments = [arg for group in docker.command(stage, cluster) for arg in group]
    assert arguments[0] == "docker"
    # The script first removes a container that an earlier start may have left.
    removal = ["rm", "--force", docker.container_name(stage)]
    assert (tmp_path / "arguments").read_text().splitlines() == [*removal, *arguments[1:]]


def test_several_nodes_missing_images_and_malformed_options_are_refused(prepare: Prepare) -> None:
    two_nodes = "stages.distill.resources.nodes=2 stages.distill.micro_batch_size=2"
    for overrides, message in (
        (two_nodes, "cluster=docker is one machine"),
        ("cluster.images.default=null", "no image is set for stage"),
        ("cluster.options=[host]", "an option of docker run"),  # does not start with a hyphen
    ):
        with pytest.raises(RecipeError, match=message):
            prepare(*DOCKER, *overrides.split())


def test_inputs_and_models_are_mounted_once_and_read_only(
    prepare: Prepare, plan: MakePlan, complete: Complete, tmp_path: Path, hf_folder: Path
) -> None:
    model = (f"model.hf_path={hf_folder}", *SMALL_STUDENT)
    complete(plan(*model))
    # Prune takes its checkpoint from outside of the run directory.
    shared = (tmp_path / "run" / "import_hf").rename(tmp_path / "shared")
    planned, cluster = prepare(
        *(*DOCKER, *model, "only=[import_hf,prepare_data,score,prune]"),
        f"stages.prune.inputs.checkpoint={shared}",
        f"cluster.mounts=[{tmp_path}/run]",  # every stage mounts the run directory anyway
    )
    mounts = container.mounts_of(stage_named(planned, "import_hf"), cluster)
    is_read_only = {str(mount.path): mount.read_only for mount in mounts}
    assert is_read_only[str(hf_folder)] is True
    assert is_read_only[str(cache_dir())] is False
    prune_mounts = list(map(str, container.mounts_of(stage_named(planned, "prune"), cluster)))
    assert f"{shared}:{shared}:ro" in prune_mounts
    assert sum(str(tmp_path / "run") in mount for mount in prune_mounts) == 1


def test_tokenized_text_with_a_licence_is_mounted(prepare: Prepare, tmp_path: Path) -> None:
    """The option ``#licence=`` is not part of the path.

    The distillation needs the mount, too: the result of ``prepare_data`` has links to the files.
    """
    prefix = write_token_files(tmp_path / "corpus")
    planned, cluster = prepare(
        *(*DOCKER, "data.sources=[]", "data.heldout_sources=[]", "skip_rules=[tokens]"),
        f"data.prefix='{prefix}#licence=CC-BY-4.0'",
    )
    for stage in ("prepare_data", "distill"):
        mounts = list(map(str, container.mounts_of(stage_named(planned, stage), cluster)))
        assert f"{prefix}.bin:{prefix}.bin:ro" in mounts
