"""Submission to Slurm: requested resources, inherited variables, running jobs and scripts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from launch import slurm_queue
from launch.executors import slurm
from launch.slurm_queue import RECORD, owner, read_jobs, run_hash
from recipes.core.errors import RecipeError
from recipes.core.run_state import begin_work, discard_work
from tests.support.launcher import write_program
from tests.support.manifests import unfinished_manifest
from tests.unit.conftest import RECIPE, stage_named

if TYPE_CHECKING:
    from launch.plan import Plan
    from tests.unit.conftest import Complete, Launch, MakePlan

SLURM = ("cluster=slurm", "hardware=h100", "cluster.images.tensorrt_llm=engine:1")


@pytest.fixture
def without_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans large recipes without requests to the hub, from the configs in this repository."""
    monkeypatch.setattr("recipes.planning.chain.is_config_available", lambda _: False)


@pytest.mark.usefixtures("without_hub")
def test_a_search_gets_the_devices_of_its_training_runs(plan: MakePlan) -> None:
    search = plan(*SLURM, recipe="recipe=qwen3_8b_search")
    cluster = slurm.SlurmConfig(cpus_per_task=64)
    text = slurm.job_script(stage_named(search, "successive_halving"), cluster)
    # A node of hardware=h100 has 8 GPUs.
    for expected_text in ("--gpus-per-node=8\n", "--exclusive\n", "CPUS_ON_NODE / 8 :"):
        assert expected_text in text
    assert "--nproc-per-node=1 " in text, "the training runs of the search start their own ranks"
    assert "cpus-per-task" not in text, "a job on a whole node uses all its CPUs"
    assert "--cpu-bind=none" in text
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1\n" in text


@pytest.mark.usefixtures("without_hub")
def test_sbatch_and_srun_request_the_same_cpus(plan: MakePlan) -> None:
    large = plan(*SLURM, recipe="recipe=qwen3_8b_depth")
    cluster = slurm.SlurmConfig(cpus_per_task=64)
    # The recipe sets 16 CPUs for prepare_data. prune has the default of the cluster.
    for name, cpus in (("prepare_data", "16"), ("prune", "64")):
        text = slurm.job_script(stage_named(large, name), cluster)
        assert re.findall(r"--cpus-per-task=(\d+)", text) == [cpus, cpus], "of sbatch and of srun"


def write_scripts(planned: Plan, **cluster: Any) -> None:
    """Makes the stage directories of a plan and its scripts; ``cluster`` has settings of Slurm."""
    for stage in planned.stages:
        stage.directory.mkdir(parents=True, exist_ok=True)
    slurm.write_scripts(planned, slurm.SlurmConfig(**cluster))


def test_submission_removes_variables_that_would_override_the_scripts(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(*SLURM)
    write_scripts(planned, partition="batch", sbatch=["--reservation night"])
    job_environment = tmp_path / "job_environment"  # where a fake sbatch writes its variables
    for program, body in (("sbatch", f"env >>{job_environment}; echo 7"), ("squeue", "true")):
        write_program(tmp_path / "bin" / program, body)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    allocation = ("SLURM_NTASKS", "SLURM_CPU_BIND", "PMIX_RANK", "PMI_SIZE", "CUDA_VISIBLE_DEVICES")
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")
    defaults = ("SBATCH_TIMELIMIT", "SBATCH_PARTITION", "SBATCH_ACCOUNT", "SLURM_CONF")
    defaults += ("SBATCH_RESERVATION", "SBATCH_CLUSTERS")
    for name in (*allocation, *ranks, *defaults):
        monkeypatch.setenv(name, "1")
    subprocess.run([planned.run_dir / "submit.sh"], check=True)
    names = re.findall(r"^\w+(?==)", job_environment.read_text(), re.M)  # from lines NAME=VALUE
    # The scripts set a partition and a reservation, but no account: the user's account stays.
    assert {*allocation, *ranks, *defaults} & set(names) == {"SLURM_CONF", "SBATCH_ACCOUNT"}


def test_a_job_that_cannot_be_recorded_is_cancelled(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(*SLURM)
    write_scripts(planned)
    (planned.run_dir / RECORD).symlink_to("/dev/full")  # writes fail, as on a full disk
    for program, body in (("sbatch", "echo 7"), ("scancel", f'echo "$@" >>{tmp_path}/cancelled')):
        write_program(tmp_path / "bin" / program, body)
    # Reads of /dev/full never end, so this grep finds nothing in jobs.txt without reading it.
    write_program(tmp_path / "bin" / "grep", '[[ "$*" = *jobs.txt ]] || exec /usr/bin/grep "$@"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    process = subprocess.run([planned.run_dir / "submit.sh"], check=False, capture_output=True)
    assert process.returncode == 1
    assert (tmp_path / "cancelled").read_text() == "7\n"


@pytest.fixture
def queued(
    plan: MakePlan, complete: Complete, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Makes a run whose stage ``distill`` is job 7, and whose earlier stages are complete.

    A fake squeue prints the file ``queue``. A line is ``ID|STATE|REASON|TIME_LEFT|NODES``.
    """
    planned = plan(*SLURM)
    write_scripts(planned)
    names = [stage.name for stage in planned.stages]
    complete(planned, *names[: names.index("distill")])
    fingerprint = stage_named(planned, "distill").fingerprint
    (planned.run_dir / RECORD).write_text(
        f"distill 7 {owner()} {fingerprint} {run_hash(planned.run_dir)}\n"
    )
    (tmp_path / "queue").write_text("7|PENDING|Dependency|1:00|\n")
    write_program(tmp_path / "bin" / "squeue", f"cat {tmp_path}/queue")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)


@pytest.mark.usefixtures("queued")
def test_a_job_is_adopted_only_if_it_makes_the_planned_result(
    plan: MakePlan, complete: Complete
) -> None:
    cluster = slurm.SlurmConfig()

    def action(*overrides: str) -> str:
        """Returns the action of ``distill``; "adopt" means that job 7 runs the stage."""
        prepared = slurm.prepare(plan(*SLURM, *overrides), cluster)
        return stage_named(prepared, "distill").action

    assert action() == action("force=[distill]") == "adopt", "there is no result to replace"
    distill = stage_named(plan(*SLURM), "distill")
    begin_work(distill.directory, unfinished_manifest(distill.request()))
    (distill.directory / "work" / "checkpoints" / "step=49-last").mkdir(parents=True)
    with pytest.raises(RecipeError, match="distill is running, at step 50"):
        action("stages.distill.seed=1")
    discard_work(distill.directory)
    for only in ("only=null", "only=[prune]"):
        with pytest.raises(RecipeError, match=r"job 7 .* but prune must run again"):
            action("force=[prune]", only)
    complete(plan(*SLURM))  # the job has written its result, but is still in the queue
    assert action() == "adopt"
    with pytest.raises(RecipeError, match=r"job 7 .* not replace"):
        action("force=[distill]")
    # Scripts of a forced stage name the result that they replace. So job 7 now replaces it.
    forced = plan(*SLURM, "force=[distill]")
    slurm.write_scripts(forced, cluster)
    assert action("force=[distill]") == "adopt", "the command can be repeated"


@pytest.mark.usefixtures("queued")
def test_a_job_that_is_ending_is_awaited_and_not_adopted(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_queue, "POLL_SECONDS", 0.01)
    queue = tmp_path / "queue"
    queue.write_text("7|COMPLETING|None|1:00|n1\n")
    threading.Timer(1, lambda: queue.write_text("7|CANCELLED|None|1:00|n1\n")).start()
    prepared = slurm.prepare(plan(*SLURM), slurm.SlurmConfig())
    assert stage_named(prepared, "distill").action == "run"
    queue.write_text("7|COMPLETING|None|1:00|n1\n")
    monkeypatch.setattr(slurm_queue, "MAX_COMPLETING_SECONDS", 0)
    with pytest.raises(RecipeError, match="does not end job 7"):
        slurm.prepare(plan(*SLURM), slurm.SlurmConfig())


@pytest.mark.usefixtures("queued")
def test_submission_by_hand_waits_for_a_job_that_is_ending(plan: MakePlan, tmp_path: Path) -> None:
    run_dir, queue = plan(*SLURM).run_dir, tmp_path / "queue"
    write_program(tmp_path / "bin" / "sbatch", "echo 8")

    def submit_distill() -> str:
        """Runs ``submit.sh``; returns the id of the job of ``distill``: the old or a new job."""
        command = [run_dir / "submit.sh"]
        process = subprocess.run(command, check=True, capture_output=True, text=True)
        return re.findall(r"distill (\d+)", process.stdout)[-1]

    # submit.sh asks squeue for the state only, so ``queue`` has no other columns.
    queue.write_text("PENDING\n")
    assert submit_distill() == "7"
    queue.write_text("COMPLETING\n")
    threading.Timer(1, lambda: queue.write_text("")).start()
    assert submit_distill() == "8"
    assert read_jobs(run_dir)["distill"].owner == owner()


@pytest.mark.parametrize("cluster", ["local", "docker", "slurm"])
def test_scripts_of_a_dry_run_pass_shellcheck_and_hold_no_secrets(
    launch: Launch, tmp_path: Path, cluster: str
) -> None:
    secrets = {"HF_TOKEN": "hf_seen", "WANDB_API_KEY": "wandb_seen", "MY_TOKEN": "my_seen"}
    process = launch(
        *(RECIPE, f"cluster={cluster}", "dry_run=true", f"run_dir={tmp_path}/run"),
        "cluster.pass_env=[HF_TOKEN,WANDB_API_KEY,MY_TOKEN]",
        # Characters that the scripts must quote.
        "+cluster.env.WORDS='it is \"$HOME\" `id`'",
        *([] if cluster == "local" else ["cluster.gpus=null"]),  # requests no GPUs
        *(['cluster.images.default="registry#image:1"'] if cluster == "slurm" else []),
        **secrets,
    )
    assert process.returncode == 0, process.stderr
    run = tmp_path / "run"
    scripts = [*run.glob("*/run.sh"), *run.glob("*/job.sbatch"), *run.glob("submit.sh")]
    num_stages = len([*run.glob("*/config.yaml")])
    assert num_stages >= 9, "a pruning recipe has at least the 9 stages of tests.support.runs"
    # Each stage has one script. On Slurm, the run also has submit.sh.
    assert len(scripts) == num_stages + (1 if cluster == "slurm" else 0)
    subprocess.run([Path(sys.executable).with_name("shellcheck"), *scripts], check=True)
    texts = [file.read_text() for file in run.rglob("*") if file.is_file()]
    assert not [text for text in texts for secret in secrets.values() if secret in text]
    # Containers get variables by name. A local stage inherits the launcher's variables.
    assert cluster == "local" or any("MY_TOKEN" in text for text in texts)
