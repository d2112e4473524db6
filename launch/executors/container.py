"""What a container needs to see: images, mounts and variables, for docker and for Pyxis.

Everything is mounted where it is outside, so that no path has to be translated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from launch.cluster import Cluster, layout_variables
from launch.plan import Plan
from launch.planned import PlannedStage, stage_names
from recipes.core.errors import RecipeError, require_known
from recipes.core.files import REPO_ROOT
from recipes.core.wheels import cache_dir

DEFAULT = "default"
MOUNTABLE = re.compile(r"/[\w./@+=-]+")


@dataclass
class Containers(Cluster):
    """Settings of an executor that runs stages in containers."""

    images: dict[str, str | None] = field(default_factory=dict)
    """Image by stage module, such as ``build_engine``; ``default`` for all others."""
    mounts: list[str] = field(default_factory=list)
    """Folders to mount besides those that a stage is known to need; ``:ro`` at the end protects."""


@dataclass(frozen=True)
class Mount:
    """A path that is the same inside and outside."""

    path: Path
    read_only: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.path}" + (":ro" if self.read_only else "")


def require_usable(plan: Plan, cluster: Containers) -> None:
    """Refuses images that are for no stage, and paths that cannot be mounted."""
    require_stages("images", cluster.images, DEFAULT)
    for stage in plan.todo():
        for mount in mounts_of(stage, cluster):
            if not MOUNTABLE.fullmatch(str(mount.path)):
                raise RecipeError(
                    f"{mount.path} cannot be mounted: it is the root, or has a space or another "
                    "character that mount options cannot hold.",
                    "work in a folder with a plain name",
                )


def require_stages(setting: str, names: Iterable[str], *others: str) -> None:
    """Raises ``RecipeError`` if a setting by stage is for none."""
    for name in names:
        where = f"cluster.{setting}.{name}"
        require_known(name, [*others, *stage_names()], f"{where} is for no stage")


def mounts_of(stage: PlannedStage, cluster: Containers) -> list[Mount]:
    """Everything that the stage reads or writes, parents first.

    The checkout, the directory that the launcher was called in (relative paths start there), the
    run, the cache; inputs from other runs and files of the user's read-only.
    """
    writable = {REPO_ROOT, Path.cwd(), stage.directory.parent, cache_dir().absolute()}
    external = stage.stage.external(stage.config)
    readable = {ref.directory for ref in stage.inputs.values()} | {
        path.absolute() for path in external.values()
    }
    for text in cluster.mounts:
        (readable if text.endswith(":ro") else writable).add(Path(text.removesuffix(":ro")))
    found: list[Mount] = []
    for path in sorted(writable | readable):
        # A read-only mount may hide nothing writable: what is below a mount of its kind is there.
        above = [m for m in found if path.is_relative_to(m.path)]
        if not above or (path in writable and all(m.read_only for m in above)):
            found.append(Mount(path, path not in writable))
    return found


def environment(cluster: Containers, stage: PlannedStage) -> dict[str, str]:
    """Variables in the container: a home that is writable and kept between runs, and the user's."""
    cache = str(cache_dir().absolute())
    at_home = {
        "HOME": cache,
        # Inductor asks for the name of its user, whom the image need not know.
        "USER": "nemo-recipes",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torchinductor",
    }
    return {
        "PYTHONPATH": str(REPO_ROOT),
        **(at_home if stage.image else {}),
        "NEMO_RECIPES_CACHE": cache,
        **layout_variables(stage),
        **cluster.env,
        **stage.config.resources.env,
    }
