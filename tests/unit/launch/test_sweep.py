"""Sweeps that are refused, because runs would overwrite each other or there are none."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launch.sweep import require_separate_results
from recipes.core.errors import RecipeError
from tests.unit.conftest import RECIPE

if TYPE_CHECKING:
    from tests.unit.conftest import Compose, Launch


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        # The run directory does not depend on the second swept field.
        (["run_dir=x-${stages.prune.target_hidden_size}", "confirm_above=1,2"], "run_dir="),
        (["hydra.sweep.subdir=x"], "run_dir="),
        (["hub.push=me/${recipe_name}", "engine=null"], "hub.push=me/llama_width_prune"),
    ],
)
def test_runs_of_a_sweep_do_not_overwrite_each_other(
    launch: Launch, overrides: list[str], name: str
) -> None:
    sizes = "stages.prune.target_hidden_size=448,512"
    process = launch("-m", RECIPE, "dry_run=true", sizes, *overrides)
    assert process.returncode == 1
    assert f"an earlier run of this sweep has {name}" in process.stderr


def test_refused_and_empty_sweeps_leave_no_files(launch: Launch, tmp_path: Path) -> None:
    for overrides, message in (
        (("run_dir=x", "confirm_above=1,2"), "several runs of this sweep would have run_dir=x"),
        (("confirm_above=-1,-2",), "runs that failed: 2"),
        (("hub=null", "confirm_above=1,2"), "invalid hub=None: must have fields"),
        (("confirm_above=range(1,1)",), "this sweep has no run"),
        ((f"hydra.sweep.dir={__file__}",), f"{__file__} is a file"),
    ):
        process = launch("-m", RECIPE, "dry_run=true", *overrides)
        assert process.returncode == 1
        assert message in process.stderr
        assert not list((tmp_path / "cwd" / "runs").glob("sweeps/*"))


@pytest.mark.parametrize(
    ("overrides", "separate"),
    [
        ("run_dir=both", False),
        ("run_dir=runs/${hydra:job.num}", True),
        ("run_dir=one,two", True),
        ("run_dir=one,two,one", False),
        ("run_dir=one,two stages.distill.lr=1e-4,2e-4", False),
        ("run_dir=one-${stages.distill.lr},two-${stages.distill.lr} stages.distill.lr=1,2", True),
        ("run_dir=one,two only=[plan,prune]", True),  # the list of ``only`` is one value
        ("hub.push=me/small", False),
        ("hub.push=me/small-1,me/small-2", True),
    ],
)
def test_runs_of_a_sweep_need_separate_results(
    compose: Compose, overrides: str, separate: bool
) -> None:
    first_value = overrides.partition(",")[0]  # "run_dir=one" of "run_dir=one,two …"
    config_of_first_run = compose(RECIPE, first_value)
    refusal = pytest.raises(RecipeError, match=f"several runs .* would have {first_value}")
    with contextlib.nullcontext() if separate else refusal:
        require_separate_results(config_of_first_run, ["-m", RECIPE, *overrides.split()])
