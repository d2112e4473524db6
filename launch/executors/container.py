"""Images, mounts and environment variables of stages in containers, for docker and for Pyxis.

A mounted path is the same inside and outside of a container.
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
from recipes.core.wheels import cache_dir
from recipes.data.settings import PrepareDataConfig
from recipes.data.token_files import paths_of
from recipes.planning.chain import TENSORRT_LLM

DEFAULT = "default"
LOCAL_CACHES = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")
"""Variables of compilation caches. Each start of a stage gets new caches on its node's disk.

PyTorch compiles extensions under a lock file. A killed process leaves the lock file behind, and
then every process with the same cache waits forever.
"""
MOUNTABLE = re.compile(r"/[\w./@+=-]+")  # without spaces, colons and commas; not the root


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
    """Refuses images for unknown stages, and paths that cannot be mounted."""
    require_stages("images", cluster.images, DEFAULT, TENSORRT_LLM)
    for stage in plan.todo():
        for mount in mounts_of(stage, cluster):
            if not MOUNTABLE.fullmatch(str(mount.path)):
                raise RecipeError(
                    f"{mount.path} cannot be mounted: it is the root, or has a space or another "
                    "character that mount options cannot hold.",
                    "work in a folder with a plain name",
                )


def require_stages(setting: str, names: Iterable[str], *other_keys: str) -> None:
    """Refuses keys of a setting that are neither stage modules nor ``other_keys``."""
    for name in names:
        where = f"cluster.{setting}.{name}"
        require_known(name, [*other_keys, *stage_names()], f"{where} is for no stage")


def mounts_of(stage: PlannedStage, cluster: Containers) -> list[Mount]:
    """Returns the mounts of all paths that a stage reads or writes, parents first.

    Writable are the current directory (where relative paths start), the run directory (which
    contains the code), the cache and the hub's folders. Inputs from other runs and the user's files
    are read-only.
    """
    writable = {Path.cwd(), stage.directory.parent, cache_dir().absolute()}
    writable |= {Path(folder) for folder in hub_folders().values()}
    external = stage.definition.external(stage.config)
    readable = {ref.directory for ref in stage.inputs.values()}
    # The absolute path may be in a mounted folder, but pass through a link that leads out of it.
    for path in [p for file in external.values() for p in _followed_paths(file.absolute())]:
        readable |= {path, *_link_folders(path)}
    # With ``prefix``, the result of ``prepare_data`` has links to the user's files.
    for config in stage.chain.stages.values():
        if isinstance(config, PrepareDataConfig) and config.prefix:
            readable |= {path.resolve() for path in paths_of(config.prefix_path).values()}
    for text in cluster.mounts:
        (readable if text.endswith(":ro") else writable).add(Path(text.removesuffix(":ro")))
    mounts: list[Mount] = []
    for path in sorted(writable | readable):
        # A path below a mounted parent needs a mount only if it is writable and the parent is not.
        parents = [m for m in mounts if path.is_relative_to(m.path)]
        if not parents or (path in writable and all(m.read_only for m in parents)):
            mounts.append(Mount(path, path not in writable))
    return mounts


def _followed_paths(path: Path) -> Iterator[Path]:
    """Yields a path, the path after each link on its way, and the path without links."""
    yield from (path, path.resolve())
    link = next((p for p in (*reversed(path.parents), path) if p.is_symlink()), None)
    if link and path.exists():  # a loop of links does not exist
        yield from _followed_paths(_link_target(link) / path.relative_to(link))


def _link_folders(path: Path) -> Iterator[Path]:
    """Yields the paths that a container needs to follow a link and the links in a folder.

    Links are not resolved, because a mounted path has no links in a container. A link to a folder
    without links needs nothing else: its own mount has the files of the folder.
    """
    if not any(file.is_symlink() for file in path.rglob("*")):
        return
    while path.is_symlink() and path.exists():
        yield path.parent  # so that the container has the link: links in its target are relative
        path = _link_target(path)
        yield path
    for file in path.rglob("*"):
        while file.is_symlink() and file.exists():
            file = _link_target(file)
            yield file.parent


def _link_target(link: Path) -> Path:
    return Path(os.path.normpath(link.parent / link.readlink()))


def environment(cluster: Containers, stage: PlannedStage) -> dict[str, str]:
    """Returns the environment variables of a stage in a container."""
    return {
        **hub_folders(),
        "NEMO_RECIPES_CACHE": str(cache_dir().absolute()),
        **stage_variables(stage, cluster),
    }


def home(stage: PlannedStage) -> dict[str, str]:
    """Returns the variables of a container's user: a writable home in the cache directory.

    Empty for a stage without an image. Set them only inside the container: outside, ``HOME`` would
    also tell Enroot where to look for credentials and images.
    """
    cache = str(cache_dir().absolute())
    variables = {
        "HOME": cache,
        # Inductor looks up the user's name, which the image may not have.
        "USER": "nemo-recipes",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torchinductor",
    }
    return variables if stage.image else {}
