"""Images, mounts and environment variables of stages in containers.

Docker runs the containers on one machine, and Slurm's plugin Pyxis runs them in jobs. A mounted
path is the same inside and outside of a container.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from launch.cluster import Cluster, stage_variables
from launch.machine import hub_folders
from launch.plan import Plan
from launch.planned import PlannedStage, stage_names
from recipes.core.errors import RecipeError, require_known
from recipes.core.manifest import ARTIFACT
from recipes.core.wheels import cache_dir
from recipes.data.settings import PrepareDataConfig
from recipes.data.token_files import paths_of
from recipes.planning.chain import TENSORRT_LLM

DEFAULT = "default"
"""Key in ``cluster.images`` of the image for stages that have no other image."""
LOCAL_CACHES = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")
"""Variables with the paths of compilation caches. Each start of a stage gets new, empty caches on
its node's disk, because a killed process leaves PyTorch's lock file in its cache. Every later
process with this cache would wait forever."""
MOUNTABLE = re.compile(r"/[\w./@+=-]+")
"""Matches paths that can be mounted: not the root, and without spaces, colons and commas."""


@dataclass
class Containers(Cluster):
    """Settings of an executor that runs stages in containers."""

    images: dict[str, str | None] = field(default_factory=dict)
    """Images by key: ``tensorrt_llm`` for stages that run TensorRT-LLM, ``default`` for all other
    stages, or the name of one stage module, such as ``distill``."""
    mounts: list[str] = field(default_factory=list)
    """Folders to mount in addition to those that stages need; ``FOLDER:ro`` is read-only."""


@dataclass(frozen=True)
class Mount:
    """A path that is mounted at the same path in the container."""

    path: Path
    read_only: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.path}" + (":ro" if self.read_only else "")


def require_usable(plan: Plan, cluster: Containers) -> None:
    """Raises ``RecipeError`` for images of unknown stages, and for paths that cannot be mounted."""
    require_stages("images", cluster.images, DEFAULT, TENSORRT_LLM)
    for stage in plan.todo():
        for mount in mounts_of(stage, cluster):
            if not MOUNTABLE.fullmatch(str(mount.path)):
                raise RecipeError(
                    f"{mount.path} cannot be mounted for stage {stage.name}: it is the root, or "
                    "has a space or another character that mount options cannot hold.",
                    "use a path of letters, digits and ./@+=_-",
                )


def require_stages(setting: str, keys: Iterable[str], *other_keys: str) -> None:
    """Raises ``RecipeError`` unless all keys of a setting are stage modules or ``other_keys``.

    ``setting`` is the name of a mapping below ``cluster``, such as ``images``.
    """
    for key in keys:
        message = f"cluster.{setting}.{key} is for no stage"
        require_known(key, [*other_keys, *stage_names()], message)


def mounts_of(stage: PlannedStage, cluster: Containers) -> list[Mount]:
    """Returns the mounts of all paths that a stage reads or writes, parents first."""
    # Relative paths start at the current directory. The run directory has the stage's code.
    writable = {Path.cwd(), stage.directory.parent, cache_dir().absolute(), *_hub_mounts()}
    read_only = set(_read_paths(stage))
    for folder in cluster.mounts:
        paths = read_only if folder.endswith(":ro") else writable
        paths.add(Path(folder.removesuffix(":ro")))
    mounts: list[Mount] = []
    for path in sorted(writable | read_only):  # a parent sorts before its children
        # A path below a mounted parent needs a mount only if it is writable and the parent is not.
        parents = [m for m in mounts if path.is_relative_to(m.path)]
        if not parents or (path in writable and all(m.read_only for m in parents)):
            mounts.append(Mount(path, read_only=path not in writable))
    return mounts


def _read_paths(stage: PlannedStage) -> Iterator[Path]:
    """Yields the inputs and the user's files that a stage reads, and the targets of their links."""
    for ref in stage.inputs.values():
        # With the setting ``prefix``, the user gives files of tokens, and the result of
        # ``prepare_data`` has only links to these files.
        yield from (ref.directory, *_link_folders(ref.directory / ARTIFACT))
    for file in stage.definition.external(stage.config).values():
        # A path in a mounted folder may pass through a link whose target is not mounted.
        for path in _followed_paths(file.absolute()):
            yield from (path, *_link_folders(path))
    # Before ``prepare_data`` runs, there are no links yet to the files of ``prefix``.
    for config in stage.chain.stages.values():
        if isinstance(config, PrepareDataConfig) and config.prefix:
            yield from (path.resolve() for path in paths_of(config.prefix_path).values())


def _hub_mounts() -> Iterator[Path]:
    """Yields the folders of huggingface_hub."""
    for folder in map(Path, hub_folders().values()):
        yield folder
        if (folder / "hub").is_dir():
            yield (folder / "hub").resolve()  # the models may be on a larger disk


def _followed_paths(path: Path) -> Iterator[Path]:
    """Yields a path, and the paths that result when its links are replaced one after the other.

    If ``/a`` links to ``/b``, and ``/b/c`` to ``/d``, the paths of ``/a/c`` are ``/a/c``, ``/b/c``
    and ``/d``. A path may occur repeatedly.
    """
    yield path
    yield path.resolve()  # replaces all links at once, even if the last target does not exist
    from_root = (*reversed(path.parents), path)
    first_link = next((parent for parent in from_root if parent.is_symlink()), None)
    if first_link and path.exists():  # false for links in a loop, which would recurse forever
        yield from _followed_paths(_link_target(first_link) / path.relative_to(first_link))


def _link_folders(path: Path) -> Iterator[Path]:
    """Yields the paths to mount so that the links in the folder ``path`` work in a container.

    Yields nothing without such links. Relative links start at the real location of ``path``. But
    Docker and Pyxis resolve what they mount: a mounted link is a plain folder in the container. So
    if ``path`` is a link, its parent and its target are mounted, as are the targets' parents of the
    links in it.
    """
    if not any(file.is_symlink() for file in path.rglob("*")):
        return
    while path.is_symlink() and path.exists():
        yield path.parent  # has the link itself
        path = _link_target(path)
        yield path
    for file in path.rglob("*"):
        while file.is_symlink() and file.exists():  # a link may lead to another link
            file = _link_target(file)
            yield file.parent


def _link_target(link: Path) -> Path:
    """Returns the absolute path to which a link points, without following further links."""
    return Path(os.path.normpath(link.parent / link.readlink()))


def environment(cluster: Containers, stage: PlannedStage) -> dict[str, str]:
    """Returns the environment variables of a stage in a container."""
    # NVIDIA's images request all GPUs, so on a node without a driver their containers do not start.
    # The value "void" requests none.
    no_gpus = {"NVIDIA_VISIBLE_DEVICES": "void"} if stage.image and not stage.uses_gpu else {}
    return {
        **no_gpus,
        **hub_folders(),
        "NEMO_RECIPES_CACHE": str(cache_dir().absolute()),
        **stage_variables(stage, cluster),
    }


def home(stage: PlannedStage) -> dict[str, str]:
    """Returns ``HOME`` and other variables of a stage's container; empty without an image.

    Set them only inside the container: outside, Enroot has its credentials and images in ``HOME``.
    """
    if not stage.image:
        return {}
    cache = str(cache_dir().absolute())
    return {
        "HOME": cache,
        # Inductor looks up the user's name, which the image may not have.
        "USER": "nemo-recipes",
        # A node's own value may be a folder that the container lacks, which stops mpirun.
        "TMPDIR": "/tmp",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torchinductor",
    }
