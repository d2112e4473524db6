"""Patches replace attributes of libraries, and refuse an original that has changed."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from launch.executors.local import PRELOADED
from recipes.backend.patches import (
    Patch,
    applied,
    apply,
    apply_to,
    constant,
    fingerprint,
    replace_with,
    wrap,
)
from recipes.core.errors import RecipeError
from tests.support.forked import run_forked

CHECK_ALL_PATCHES = """
from recipes.backend.patches import _find
from recipes.backend.cpu_speed import SPEED_PATCHES
from recipes.backend.without_cuda import CUDA_NAMES, REQUIRED
from recipes.rehearsal import checkpoints, fake_cuda, files, messages, patches
groups = [[CUDA_NAMES], *REQUIRED.values(), *SPEED_PATCHES.values(), fake_cuda.patches()]
for group in (*groups, *(module.PATCHES for module in (checkpoints, files, messages, patches))):
    for patch in group:
        _find(patch)
"""
"""Script that fails if the original of any patch is missing or has another fingerprint."""


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with a function and a flag, which tests patch."""
    module: Any = ModuleType("library_to_patch")
    module.rate = shutil.which  # some function with Python source
    module.FAST = False
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def patch_of(library: Any, name: str, **fields: Any) -> Patch:
    """Returns a patch that replaces an attribute by a function that returns 7, unless changed."""
    source_hash = fingerprint(getattr(library, name))
    patch = Patch(f"{library.__name__}:{name}", "a test", source_hash, constant(7))
    return replace(patch, **fields)


def test_originals_have_the_fingerprints_of_their_patches(tmp_path: Path) -> None:
    """Checks all patches in a fork of a process without patches."""
    script = tmp_path / "check.py"
    script.write_text(CHECK_ALL_PATCHES)
    done = run_forked(PRELOADED, [str(script)], os.environ, tmp_path)
    assert done.returncode == 0, done.stderr


def test_functions_in_c_are_distinguished_by_signature() -> None:
    """They have no Python source to hash."""
    assert fingerprint(torch.mm) != fingerprint(torch.bmm)


def test_apply_replaces_attributes(library: Any) -> None:
    apply([patch_of(library, "rate"), patch_of(library, "FAST", replace=replace_with(True))])
    assert library.rate("x") == 7
    assert library.FAST is True


def test_applied_restores_the_original_after_an_error_in_its_block(library: Any) -> None:
    before = library.rate
    with contextlib.suppress(KeyError), applied([patch_of(library, "rate")]):
        assert library.rate() == 7
        raise KeyError
    assert library.rate is before


def test_a_target_that_does_not_exist_is_an_error(library: Any) -> None:
    patch = patch_of(library, "rate", target="library_to_patch:gone")
    with pytest.raises(RecipeError, match=r"library_to_patch:gone does not exist"):
        apply([patch])


@pytest.mark.parametrize("name", ["rate", "FAST"])
def test_an_original_with_another_fingerprint_is_an_error(library: Any, name: str) -> None:
    patch = patch_of(library, name, source_hash="0123456789ab")
    with pytest.raises(RecipeError, match=f"library_to_patch:{name} has the fingerprint"):
        apply([patch])


def test_applied_restores_the_originals_if_a_later_patch_is_refused(library: Any) -> None:
    before = library.rate
    # The fingerprint of a flag is the name of its type, bool. So the second patch is refused.
    patches = [patch_of(library, "rate"), patch_of(library, "FAST", source_hash="str")]
    with pytest.raises(RecipeError), applied(patches):
        pytest.fail("the block must not start")
    assert library.rate is before


class Engine:
    def speed(self) -> int:
        return 3


class FastEngine(Engine):
    def speed(self) -> int:
        return 5


def test_apply_to_patches_only_one_object_and_refuses_an_overridden_method() -> None:
    doubled = wrap(lambda original, engine: 2 * original(engine))
    patch = Patch(f"{__name__}:Engine.speed", "a test", fingerprint(Engine.speed), doubled)
    patched, other = Engine(), Engine()
    apply_to(patched, patch)
    assert (patched.speed(), other.speed()) == (6, 3)
    with pytest.raises(RecipeError, match=r"Engine\.speed is overridden by FastEngine"):
        apply_to(FastEngine(), patch)
