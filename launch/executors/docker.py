"""Runs stages in containers on this machine, such as a DGX."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Annotated

from rich.console import Console

from launch.cluster import Follow
from launch.executors import container, local
from launch.plan import Plan
from launch.planned import PlannedStage
from launch.slurm_queue import run_hash
from recipes.core.constraints import matching
from recipes.core.errors import RecipeError
from recipes.core.wheels import cache_dir

Option = Annotated[str, matching(r"-.*", "an option of docker run, such as --network=host")]


@dataclass
class DockerConfig(container.Containers):
    """Settings of ``cluster=docker``."""

    executor: str = "docker"
    gpus: str | None = "all"
    """Value of ``docker run --gpus``; omitted if ``hardware`` has no GPUs, or if ``null``."""
    python: str = "python"
    """Interpreter in the image."""
    options: list[Option] = field(default_factory=list)
    """Further options of ``docker run``."""


CONFIG = DockerConfig
problems, dry_run = local.problems, local.dry_run  # Docker has no scheduler either


def prepare(plan: Plan, cluster: DockerConfig) -> Plan:
    """Raises ``RecipeError`` for several nodes, missing images and paths that cannot be mounted."""
    local.require_one_machine(plan, cluster)
    container.require_usable(plan, cluster)
    for stage in plan.todo():
        if not stage.image:
            raise RecipeError(
                f"no image is set for stage {stage.name}.", "set cluster.images.default=IMAGE"
            )
    return plan


def container_name(stage: PlannedStage) -> str:
    """Returns the name of a stage's container, which no stage of another run has.

    Docker refuses a second container of this name, so a stage cannot run twice at a time.
    """
    return f"nemo-recipes-{run_hash(stage.directory.parent)}-{stage.name}"


def command(stage: PlannedStage, cluster: DockerConfig) -> list[list[str]]:
    """Returns the lines of the command ``docker run`` for a stage, each as a list of arguments."""
    env = local.environment(stage, cluster) | container.home(stage)
    # These folders are in the container, which --rm deletes.
    env |= {name: f"/tmp/{name.lower()}" for name in container.LOCAL_CACHES}
    # Last, so that the user's variables and the container's PYTHONPATH replace values above.
    env |= container.environment(cluster, stage)
    lines = [
        ["docker", "run", "--rm", f"--name={container_name(stage)}"],
        [f"--gpus={cluster.gpus}"] if cluster.gpus and stage.uses_gpu else [],
        # --init: otherwise Python would be the container's process 1, which ignores SIGTERM.
        # --ipc: data loaders and NCCL share memory. memlock: NCCL pins memory without a limit.
        # stack: CUDA needs a large stack; the value is 64 MiB.
        ["--init", "--ipc=host", "--ulimit=memlock=-1", "--ulimit=stack=67108864"],
        [f"--user={os.getuid()}:{os.getgid()}"],
        # With only --user, a process lacks the user's other groups, which own shared folders.
        [f"--group-add={group}" for group in sorted({*os.getgroups()} - {os.getgid()})],
        [f"--workdir={os.getcwd()}"],
        *([f"--volume={mount}"] for mount in container.mounts_of(stage, cluster)),
        *([f"--env={name}={value}"] for name, value in env.items()),
        # Without "=VALUE", Docker passes the launcher's value. Variables in ``env`` have priority.
        [f"--env={name}" for name in cluster.pass_env if name not in env],
        list(cluster.options),
        [str(stage.image)],
        local.command(stage, cluster.python),
    ]
    return [line for line in lines if line]  # without the empty lists of omitted options


def write_scripts(plan: Plan, cluster: DockerConfig) -> None:
    """Writes ``run.sh`` of every stage that will run.

    The script first removes a container that a killed launcher may have left behind.
    """
    for stage in plan.todo():
        lines = [shlex.join(arguments) for arguments in command(stage, cluster)]
        remove_old = f"docker rm --force {container_name(stage)} >/dev/null 2>&1 || true"
        # No exports: the variables are options of ``docker run``.
        local.write_script(stage, " \\\n  ".join(lines), {}, setup=remove_old)


def start(plan: Plan, cluster: DockerConfig, follow: Follow, console: Console) -> bool:
    """Runs the stages and waits for them."""
    if shutil.which("docker") is None:
        raise RecipeError("there is no docker on this machine.", "install it, or use cluster=local")
    cache_dir().mkdir(parents=True, exist_ok=True)  # otherwise docker creates it as root
    return local.run_all(plan, follow, start_container)


@contextmanager
def start_container(stage: PlannedStage, log: IO[bytes]) -> Iterator[Callable[[], bool]]:
    """Runs a stage's ``run.sh`` during the block, and removes the stage's container afterwards.

    Usually ``--rm`` has removed the container by then. But if the stage does not stop in time, only
    docker's client is killed, and the container continues without it.

    Yields:
        A function that tells whether the stage has ended.
    """
    try:
        with local.start_script(stage, log) as has_ended:
            yield has_ended
    finally:
        remove = ["docker", "rm", "--force", container_name(stage)]
        # A second Ctrl-C does not reach this command, because it runs in its own session.
        subprocess.run(remove, capture_output=True, check=False, start_new_session=True)
