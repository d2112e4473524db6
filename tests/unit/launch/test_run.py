"""Runs the launcher's command line in a directory outside the checkout."""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from omegaconf import OmegaConf

from launch.run import run as start_run
from launch.run_status import read_statuses
from launch.schema import CONF
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import FORMAT
from recipes.core.run_state import REQUEST, RUN_FILE, begin_work, read_request
from recipes.core.snapshot import CODE
from tests.support.disks import small_disk
from tests.support.in_process import run_in_process
from tests.support.manifests import unfinished_manifest
from tests.support.runs import STAGES
from tests.unit.conftest import write_last_plan

if TYPE_CHECKING:
    from tests.unit.conftest import Complete, Compose, Launch, MakePlan

RECIPE = "recipe=llama_width_prune"
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*_prune.yaml"))
EXPORT_INDEX = STAGES.index("export_hf")
STAGES_WITH_TASKS = [*STAGES[:EXPORT_INDEX], "evaluate_tasks", *STAGES[EXPORT_INDEX:]]
WITHOUT_RUN_DIR = (RECIPE, "engine=null", "tasks=null")
ARGUMENTS = (*WITHOUT_RUN_DIR, "run_dir=../run")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run directory that ``ARGUMENTS`` sets. The common fixture ``plan`` also uses it."""
    return tmp_path / "run"


def error_of(launch: Launch, *args: str, shows_plan: bool = False) -> str:
    """Runs a command that must fail; returns its error message.

    ``shows_plan`` says whether the command prints its plan before the message.
    """
    process = launch(*args)
    assert process.returncode == 1, process.stdout + process.stderr
    assert "Traceback" not in process.stdout + process.stderr
    assert process.stderr.startswith("error: ")
    assert bool(process.stdout) == shows_plan
    return process.stderr


def files_below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_without_a_recipe_the_recipes_are_listed(launch: Launch, tmp_path: Path) -> None:
    no_arguments, with_help = launch(), launch("--help")
    assert (no_arguments.returncode, no_arguments.stderr, with_help.returncode) == (1, "", 0)
    for recipe in RECIPES:
        assert recipe in no_arguments.stdout
        assert recipe in with_help.stdout
    assert "recipe=NAME" in no_arguments.stdout
    assert "usage: python launch/run.py recipe=NAME" in with_help.stdout
    assert files_below(tmp_path) == set()


def test_config_can_be_shown(launch: Launch, tmp_path: Path) -> None:
    process = launch("--cfg", "job", RECIPE, "engine=null", "stages.prune.target_hidden_size=448")
    assert process.returncode == 0
    config = OmegaConf.create(process.stdout)
    assert config.stages.prune.target_hidden_size == 448
    assert set(STAGES_WITH_TASKS) == set(config.stages)
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([RECIPE, "stages.distill.max_steps=x"], ["'x'", "Integer", "stages.distill.max_steps"]),
        (
            [RECIPE, "stages.prune.target_hidden_size=640", "data.sources=[no.txt]"],
            ["larger than the teacher's 576", "[prune-target]", "no file 'no.txt'", "fix:"],
        ),
        (
            [RECIPE, "stages.distill.resources.nodes=2", "stages.distill.global_batch_size=8"],
            ["cluster=local is one machine"],
        ),
        ([RECIPE, f"run_dir={__file__}"], [f"{__file__} is a file"]),
        ([RECIPE, f"run_dir={__file__}/x/y"], [f"{__file__} is a file"]),
        ([RECIPE, "dry_run=true", "run_dir='runs/1:30'"], ["runs/1:30 has a colon"]),
        ([RECIPE, "dry_run=true", f"model.hf_path=/{'x' * 300}"], ["File name too long"]),
    ],
    ids=["type", "check", "nodes", "file", "parent", "colon", "model"],
)
def test_mistakes_get_one_message_and_leave_no_files(
    launch: Launch, tmp_path: Path, args: list[str], expected: list[str]
) -> None:
    message = error_of(launch, *args)
    for text in expected:
        assert text in message
    assert files_below(tmp_path) == set()


def test_dry_run_writes_configs_and_scripts_and_starts_nothing(
    launch: Launch, tmp_path: Path
) -> None:
    arguments = (RECIPE, "engine=null", "dry_run=true", "+cluster.env.WORD='a b'")
    process = launch(*arguments)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert "nothing was started" in process.stdout
    run = tmp_path / "cwd" / "runs" / "llama_width_prune"
    stage_files = {
        f"{stage}/{file}" for stage in STAGES_WITH_TASKS for file in ("config.yaml", "run.sh")
    }
    files = {file for file in files_below(run) if not file.startswith("code/")}
    assert files == {"run.yaml", ".lock", *stage_files}
    # A second dry run still finds no result.
    assert launch(*arguments).stdout.count("not run yet") == len(STAGES_WITH_TASKS)
    for stage in STAGES_WITH_TASKS:
        assert "export WORD='a b'" in (run / stage / "run.sh").read_text()
        assert OmegaConf.load(run / stage / "config.yaml").config.stage == stage


def test_sweep_gives_each_value_its_own_run_directory_and_repository(
    launch: Launch, tmp_path: Path
) -> None:
    push = "hub.push=me/small-${stages.prune.target_hidden_size}"
    sweep = ("-m", *WITHOUT_RUN_DIR, "stages.prune.target_hidden_size=448,512", push)
    process = launch(*sweep, "dry_run=true")
    assert process.returncode == 0, process.stderr
    configs = (tmp_path / "cwd" / "runs" / "sweeps").glob("*/*/prune/config.yaml")
    sizes = [OmegaConf.load(file).config.target_hidden_size for file in configs]
    assert sorted(sizes) == [448, 512]
    assert re.findall(r"hub.push=(\S+)", process.stdout) == ["me/small-448", "me/small-512"]
    assert "no best run" not in process.stdout  # a sweep says this only after real runs


@pytest.mark.parametrize("name", ["2025_01_02", "7"])
def test_run_dir_may_be_a_number_or_look_like_one(
    launch: Launch, tmp_path: Path, name: str
) -> None:
    assert launch(RECIPE, "dry_run=true", f"run_dir={name}").returncode == 0
    assert (tmp_path / "cwd" / name / RUN_FILE).is_file()


def test_a_deleted_working_directory_gets_one_message(tmp_path: Path) -> None:
    script = f'cd "$1"; rmdir "$1"; exec {sys.executable} {REPO_ROOT}/launch/run.py {RECIPE}'
    command = ["bash", "-c", script, "-", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr.startswith("error: the working directory was deleted")


def test_stopped_sweep_names_the_argument_with_which_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def sweep(*overrides: str, sizes: str = "448,512") -> str:
        """Returns the output of a sweep over hidden sizes, in a new directory by default."""
        swept_field = f"stages.prune.target_hidden_size={sizes}"
        arguments = ("-m", *WITHOUT_RUN_DIR, swept_field, *overrides)
        return run_in_process(*arguments, cwd=tmp_path).output

    with monkeypatch.context() as patch:
        patch.setattr("launch.sweep.Best.on_job_end", interrupt)  # Ctrl-C between two runs
        assert re.search(r"same command with hydra.sweep.dir=\S+ resumes", sweep("dry_run=true"))
    monkeypatch.setattr("tests.support.in_process._run", interrupt)  # Ctrl-C during a stage
    interrupted = re.search(r"same command with (hydra.sweep.dir=\S+) resumes", sweep())
    assert interrupted is not None
    assert "the same command resumes" in sweep(interrupted[1])
    # 5120 and 5121 are larger than the teacher's hidden size, so these runs are refused. A sweep
    # can only be resumed if at least one of its runs was not refused.
    assert "add hydra.sweep.dir=" in sweep("dry_run=true", sizes="448,5120")
    assert "hydra.sweep.dir" not in sweep("dry_run=true", sizes="5120,5121")
    # This run is not a sweep. Its stage is interrupted, too.
    assert "hydra.sweep.dir" not in run_in_process(*ARGUMENTS, cwd=tmp_path).output


def test_sweep_continues_after_a_run_that_is_refused_or_fails_a_gate(
    launch: Launch, plan: MakePlan, complete: Complete, run: Path
) -> None:
    gates = 'gates=["recovered>=0.99"]'
    assert launch(*ARGUMENTS, gates, "dry_run=true").returncode == 0
    complete(plan(gates))
    for number in (0, 1, 2):
        shutil.copytree(run, run.with_name("sweep") / str(number))
    # Run 0 is refused, because confirm_above must not be negative. Runs 1 and 2 fail the gate.
    sweep = ("-m", "confirm_above=-1,1,2", "hydra.sweep.dir=../sweep")
    process = launch(*WITHOUT_RUN_DIR, gates, "skip_rules=[disk]", *sweep)
    assert process.returncode == 1
    assert process.stdout.count("everything was complete") == 2, "the last two runs"
    assert process.stderr.count("error: ") == 3
    assert process.stderr.endswith("runs that failed: 3\n"), "needs no hydra.sweep.dir"


def test_sweep_ends_with_the_command_that_compares_its_runs(
    launch: Launch, plan: MakePlan, complete: Complete, run: Path
) -> None:
    assert launch(*ARGUMENTS, "dry_run=true").returncode == 0
    complete(plan())
    shutil.copytree(run, run.with_name("other"))
    process = launch("-m", *WITHOUT_RUN_DIR, "skip_rules=[disk]", "run_dir=../run,../other")
    assert process.returncode == 0, process.stderr
    command = "python launch/run.py compare ../run ../other"
    last_line = process.stdout.splitlines()[-1]
    assert last_line == f"side by side: {command}"


def test_complete_run_starts_nothing_and_keeps_its_recipe(
    launch: Launch, plan: MakePlan, complete: Complete, run: Path
) -> None:
    assert launch(*ARGUMENTS, "dry_run=true").returncode == 0
    complete(plan())
    times = {file: (run / file).stat().st_mtime_ns for file in files_below(run)}
    process = launch(*ARGUMENTS)
    assert process.returncode == 0, process.stderr
    assert "everything was complete, nothing ran" in process.stdout
    assert {file: (run / file).stat().st_mtime_ns for file in files_below(run)} == times
    other_recipe = ("recipe=llama_depth_prune", f"run_dir={run}", "dry_run=true")
    assert "is a run of recipe llama_width_prune" in error_of(launch, *other_recipe)
    # A run directory that an older version of this code wrote.
    (run / RUN_FILE).write_text(f"format: {FORMAT - 1}\nrecipe: llama_depth_prune\n")
    assert "start a new run directory" in error_of(launch, *other_recipe)
    assert files_below(run) == times.keys()


def test_status_shows_only_the_last_plan(
    launch: Launch, plan: MakePlan, complete: Complete, run: Path
) -> None:
    """Stages of earlier dry runs are not shown, unless they have been started."""

    def states() -> dict[str, str]:
        return {stage.name: stage.status for stage in read_statuses(run)}

    assert launch(*ARGUMENTS, "gguf=f16", "dry_run=true").returncode == 0
    assert states()["export_gguf"] == "not started"
    assert launch(*ARGUMENTS, "dry_run=true", "only=[plan]").returncode == 0
    assert states().keys() == set(STAGES)  # without export_gguf
    assert launch(*ARGUMENTS, "gguf=f16", "dry_run=true").returncode == 0
    complete(plan())
    assert launch(*ARGUMENTS, "dry_run=true", "stages.distill.lr=2e-4").returncode == 0
    # The settings of distill changed, so its result and three later results do not fit the plan.
    shown = launch("status", f"run_dir={run}").stdout
    assert shown.count("its settings, inputs or code differ from those of the last plan") == 4
    assert launch(*ARGUMENTS).returncode == 0  # nothing has to run
    assert states() == dict.fromkeys(STAGES, "complete")
    begin_work(run / "export_gguf", unfinished_manifest(read_request(run / "export_gguf")))
    assert states()["export_gguf"] == "interrupted"


def test_second_launcher_of_a_run_is_refused(launch: Launch, run: Path) -> None:
    """A dry run is refused, too, because it would overwrite ``config.yaml`` of stages."""
    launch(*ARGUMENTS, "dry_run=true")
    before = (run / "distill" / "config.yaml").read_text()
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for overrides in ((), ("dry_run=true", "stages.distill.max_steps=77")):
            message = error_of(launch, *ARGUMENTS, *overrides, shows_plan=True)
            assert message.startswith(f"error: another process is running {run}.")
    assert (run / "distill" / "config.yaml").read_text() == before


@pytest.mark.parametrize("dry_run", [True, False])
def test_plan_is_refused_if_another_command_changed_the_run_meanwhile(
    compose: Compose,
    plan: MakePlan,
    complete: Complete,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    dry_run: bool,
) -> None:
    """The other command completes a stage. Or it only submits jobs: then it rewrites ``run.yaml``.

    ``require_publishable`` is the last call before the launcher locks the run, so the test lets the
    other command work there.
    """
    write_last_plan(plan())
    cfg = compose(*WITHOUT_RUN_DIR, f"run_dir={run}", "skip_rules=[disk]", f"dry_run={dry_run}")
    monkeypatch.setattr("launch.executors.local.start", lambda *args: pytest.fail("started"))
    for other_command in (
        lambda *_, **__: complete(plan(), "plan"),
        lambda *_, **__: write_last_plan(plan()),
    ):
        monkeypatch.setattr("launch.run.require_publishable", other_command)
        with pytest.raises(RecipeError, match="changed while this command was planning"):
            start_run(cfg, "llama_width_prune")


def test_folder_that_is_not_a_run_is_refused_and_unchanged(launch: Launch, run: Path) -> None:
    for name in ("code/mine/a.py", "evaluate/config.yaml"):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text("mine: 1")
        before = files_below(run)
        assert "is not a run directory" in error_of(launch, *ARGUMENTS, "dry_run=true")
        assert files_below(run) == before
        assert (run / name).read_text() == "mine: 1"
        shutil.rmtree(run)


def test_killed_first_launch_is_repeated(launch: Launch, run: Path) -> None:
    """A killed launcher leaves ``.partial`` files and folders, which it had not yet renamed."""
    assert launch(*ARGUMENTS, "dry_run=true").returncode == 0
    pid = 7  # of the killed launcher
    (run / RUN_FILE).rename(run / f".{RUN_FILE}.{pid}.partial")
    (snapshot,) = (run / CODE).iterdir()
    snapshot.rename(snapshot.with_suffix(".partial"))
    (run / "plan" / REQUEST).rename(run / "plan" / f".{REQUEST}.{pid}.partial")
    (run / "plan" / "run.sh").unlink()
    assert launch(*ARGUMENTS, "dry_run=true").returncode == 0
    assert list((run / CODE).iterdir()) == [snapshot]


def test_run_dir_may_be_in_the_home_directory(launch: Launch, tmp_path: Path) -> None:
    assert launch(RECIPE, "run_dir='~/mine'", "dry_run=true", HOME=str(tmp_path)).returncode == 0
    assert (tmp_path / "mine" / RUN_FILE).is_file()
    assert launch("status", "run_dir=~/mine", HOME=str(tmp_path)).returncode == 0


def test_launcher_imports_no_library_that_is_slow_to_import(root: Path, tmp_path: Path) -> None:
    program = (
        "import sys, launch.run, recipes.report.compare\n"
        "launch.run.schema.register()\n"
        "from hydra.core.plugins import Plugins\n"
        "Plugins.instance()\n"
        "slow = 'torch transformers nemo megatron modelopt datasets numpy multistorageclient'\n"
        "print([name for name in slow.split() if name in sys.modules])\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False
    )
    assert process.stdout.strip() == "[]", process.stderr


def test_message_about_a_small_read_only_or_full_disk_has_its_reason(
    launch: Launch, tmp_path: Path
) -> None:
    """The command succeeds once the disk has space for the files of a dry run."""
    with small_disk(tmp_path / "small") as disk:
        arguments = (RECIPE, "engine=null", f"run_dir={disk.folder}/run", "dry_run=true")
        message = error_of(launch, *arguments)
        assert "needs about" in message
        assert "0.0 GB are free" in message
        assert not (disk.folder / "run").exists()
        arguments = (*arguments, "skip_rules=[disk]")
        disk.remount("ro")
        message = error_of(launch, *arguments, shows_plan=True)
        assert f"{disk.folder}/run: Read-only file system." in message
        assert "run_dir" in message
        disk.remount("rw")
        disk.leave_free(8192)  # bytes; the files of a dry run need more
        message = error_of(launch, *arguments, shows_plan=True)
        assert "No space left on device." in message
        assert "free some space" in message
        disk.remount("size=4m")
        assert launch(*arguments).returncode == 0
        assert not list(disk.folder.rglob(".*.partial"))
