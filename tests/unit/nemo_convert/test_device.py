"""The list of what depends on the device is whole; ranks and the cores near their GPUs."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_convert.device import DEPENDS, stay_near
from recipes.core.files import REPO_ROOT

ASKS = {"device", "collectives", "use_own_gpu", "own_layers", "gpus_here"}
UNASKED = ("nemo_convert.device", "recipes.rehearsal.", "recipes.planning.")
"""The questions themselves; what replaces a device; and estimates for one that is named."""


def asks(node: ast.AST) -> bool:
    """Whether this asks where a model runs, as ``device()``, or ``hardware.on_gpu`` of a plan."""
    match node:
        case ast.Call(func=ast.Name(id=name)):
            return name in ASKS
        case ast.Attribute(value=ast.Name(id="torch"), attr="cuda"):
            return True
        case ast.Attribute(value=ast.Attribute(attr="device"), attr="type"):
            return True
        case ast.Attribute(attr="is_cuda" | "on_gpu"):
            return True
    return False


def places(node: ast.AST, names: tuple[str, ...] = ()) -> Iterator[str]:
    """Outermost functions, and methods, of a module that ask."""
    if asks(node):
        yield ".".join(names)
    inside_function = names and isinstance(node, ast.FunctionDef)
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not inside_function
        yield from places(child, (*names, child.name) if named else names)


def test_every_place_that_asks_is_listed() -> None:
    found = set()
    for root in ("nemo_convert", "recipes", "launch"):
        for file in (REPO_ROOT / root).rglob("*.py"):
            module = ".".join(file.relative_to(REPO_ROOT).with_suffix("").parts)
            if not module.startswith(UNASKED):
                found |= {f"{module}:{place}" for place in places(ast.parse(file.read_text()))}
    assert found == {dependence.place for dependence in DEPENDS}


def test_every_stand_in_is_a_test() -> None:
    for dependence in DEPENDS:
        file, _, name = dependence.stands_in.partition("::")
        assert f"def {name}(" in Path(REPO_ROOT, file).read_text(), dependence


@pytest.mark.parametrize(
    ("near", "ranks", "moved"),
    [
        ("first", 2, True),
        ("first", 1, False),  # one rank would lose half of its cores
        ("all", 2, False),
        ("none", 2, False),  # the job's are on the other socket
        ("unknown", 2, False),
    ],
)
def test_a_rank_moves_to_the_cores_near_its_gpu(
    near: str, ranks: int, moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = {4, 5, 6, 7}
    listed = {"first": "0-3,4,5", "all": "0-7", "none": "64-127"}
    if near in listed:
        (tmp_path / "local_cpulist").write_text(f"{listed[near]}\n")
    bound: dict[int, set[int]] = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    monkeypatch.setattr(os, "sched_setaffinity", bound.__setitem__)
    stay_near(tmp_path, ranks)
    threads = {int(thread.name) for thread in Path("/proc/self/task").iterdir()}
    assert bound == ({thread: {4, 5} for thread in threads} if moved else {})
