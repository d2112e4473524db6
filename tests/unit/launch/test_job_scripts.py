"""The text of Slurm job scripts, and runs of them in a shell with fake programs of Slurm."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.executors import slurm
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import Acceptance
from recipes.planning.limits import MIN_MARGIN_SECONDS
from recipes.planning.training_cost import stopping_seconds
from tests.support.launcher import write_program
from tests.support.manifests import edit_manifest
from tests.unit.conftest import Complete, MakePlan, stage_named
from tests.unit.launch.conftest import SLURM, Prepare

GOLDEN = Path(__file__).with_name("golden")
"""Folder with the expected scripts."""
TWO_NODES = (
    "cluster=slurm",
    'cluster.images.default="registry#nemo:1"',
    *("cluster.partition=batch", "cluster.account=research", "cluster.qos=long"),
    'cluster.sbatch=["--reservation=night"]',
    "hardware=h100",
    "cluster.cpus_per_task=32",
    *("+cluster.env.NCCL_SOCKET_IFNAME=ib0", "+cluster.env.WORDS='it is $HOME'"),
    *("stages.distill.resources.nodes=2", "stages.distill.resources.devices=8"),
    "stages.distill.resources.time=1-12:00:00",
    'stages.distill.resources.sbatch=["--comment=night"]',
    "stages.distill.global_batch_size=64",
)
"""Overrides: a distillation on two nodes in containers, with most options of a Slurm job."""
FEW_STAGES = ("~stages.plan", "~stages.report.inputs.plan", "tasks=null", "engine=null")
"""Overrides that omit stages, which keeps ``submit.sh`` short."""
RunJob = Callable[[str], None]
"""Type of the fixture ``run_job``. Takes branches of a shell ``case`` over scontrol's arguments."""


def require_golden(text: str, name: str, tmp_path: Path) -> None:
    """Compares a script with the golden file ``name``, except for paths and hashes.

    Writes the golden file if it is missing. Instead of ``tmp_path``, it has ``/TMP``.
    """
    for path, placeholder in ((tmp_path, "TMP"), (REPO_ROOT, "REPO")):
        text = text.replace(str(path), f"/{placeholder}")
    text = re.sub(r"\b[0-9a-f]{64}\b", "FINGERPRINT", text)
    text = re.sub(r"(?<=[. ])[0-9a-f]{8}\b", "HASH", text)  # of the run directory
    # Mounts are in the order of their real paths, which differ between machines.
    for mounts in re.findall(r"--container-mounts=(\S+)", text):
        text = text.replace(mounts, ",".join(sorted(mounts.split(","))))
    golden = GOLDEN / name
    if not golden.exists():
        golden.write_text(text)
    assert text == golden.read_text(), (
        f"if this change is intended: rm {golden}, and repeat the test"
    )


def test_scripts_equal_the_golden_files(prepare: Prepare, tmp_path: Path) -> None:
    """Compares a job on two nodes in containers, a job without a container, and ``submit.sh``."""
    plan, cluster = prepare(*TWO_NODES)
    text = slurm.job_script(stage_named(plan, "distill"), cluster)
    require_golden(text, "distill.sbatch", tmp_path)
    plan, cluster = prepare("cluster=slurm", "cluster.gpus=null", "cluster.python=python3.11")
    text = slurm.job_script(stage_named(plan, "prune"), cluster)
    require_golden(text, "prune.sbatch", tmp_path)
    plan, _ = prepare(*SLURM, "teacher=cached", *FEW_STAGES)
    require_golden(slurm.submit_script(plan), "submit.sh", tmp_path)


def test_a_relative_image_file_becomes_absolute(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pyxis would import ``nemo.sqsh`` from a registry."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nemo.sqsh").touch()
    plan, cluster = prepare(*TWO_NODES, "cluster.images.default=nemo.sqsh")
    script = slurm.job_script(stage_named(plan, "distill"), cluster)
    assert f"--container-image={tmp_path}/nemo.sqsh" in script


@pytest.mark.parametrize("option", ["--mem-per-gpu=200G", "--mem-per-cpu=4G"])
def test_own_memory_options_replace_the_memory_of_whole_nodes(
    prepare: Prepare, option: str
) -> None:
    plan, cluster = prepare(*TWO_NODES, f"stages.distill.resources.sbatch=['{option}']")
    script = slurm.job_script(stage_named(plan, "distill"), cluster)
    assert "#SBATCH --exclusive" in script
    assert f"#SBATCH {option}" in script
    assert "--mem=0" not in script


def test_a_container_of_a_stage_without_gpus_asks_for_none(prepare: Prepare) -> None:
    """Without a driver, a container that asks for GPUs does not start."""
    plan, cluster = prepare(*TWO_NODES)
    script = slurm.job_script(stage_named(plan, "prepare_data"), cluster)
    assert "export NVIDIA_VISIBLE_DEVICES=void" in script
    assert "STAGE_NEEDS_GPU" not in script


def test_each_start_has_a_new_folder_for_compiled_kernels(prepare: Prepare, tmp_path: Path) -> None:
    """Runs the command that srun starts on a node. The command must remove the folder at its end.

    A fake Python records its environment, creates the folder, and fails with status 7. At the
    second start, it also sends SIGTERM to its parent, which is the tested command.
    """
    python_commands = (
        f'env >>{tmp_path}/environment; mkdir "$TORCH_EXTENSIONS_DIR" || exit 1',
        f'[ ! -f {tmp_path}/second ] || kill -TERM "$PPID"; touch {tmp_path}/second; exit 7',
    )
    python = write_program(tmp_path / "python", "\n".join(python_commands))
    plan, cluster = prepare(*SLURM, f"cluster.python={python}", "+cluster.env.TRITON_CACHE_DIR=/t")
    script = slurm.job_script(stage_named(plan, "prune"), cluster)
    # The script has ``srun OPTIONS bash -c '...' || status=$?``, over several lines.
    [command] = re.findall(r"(?s)  (bash -c '.*') \|\|", script)
    for _ in range(2):
        assert subprocess.run(command, check=False, shell=True).returncode == 7
    variables = re.findall(r"(TORCH_EXT\w+|TRITON\w+)=(.+)", (tmp_path / "environment").read_text())
    folders = {Path(folder) for name, folder in variables if name == "TORCH_EXTENSIONS_DIR"}
    # Two starts, with different folders. The environment lacks TRITON_CACHE_DIR, because the user
    # sets it: the script exports the user's value, but this test runs only the command.
    assert len(folders) == len(variables) == 2
    assert not [folder for folder in folders if folder.parent.exists()]


@pytest.fixture
def run_job(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunJob:
    """Runs a job script with a fake srun, which the test may replace, and a fake scontrol."""
    # Fails if the variable is set: nodes may not know other clusters.
    check_cluster = '[ -z "${SLURM_CLUSTERS:-}" ] || exit 1'
    write_program(tmp_path / "bin" / "srun", "exit 7")
    write_program(tmp_path / "bin" / "sleep", "exit 0")  # the script sleeps after a requeue
    job = {"JOB_ID": "7", "JOB_NODELIST": "n1", "JOB_END_TIME": "9999999999", "CPUS_ON_NODE": "4"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    plan, cluster = prepare(*SLURM)
    script = slurm.job_script(stage_named(plan, "prune"), cluster)

    def run_script(scontrol: str) -> None:
        branches = f"*hostnames*) echo n1;; {scontrol};; *) echo n1: 127.0.0.1"
        commands = f'{check_cluster}; case "$*" in {branches};; esac'
        write_program(tmp_path / "bin" / "scontrol", commands)
        assert subprocess.run(["bash", "-c", script], check=False).returncode == 7

    return run_script


@pytest.mark.parametrize(
    "getaddrs", ["echo 'n1: 10.0.0.7:6818'", "echo 'invalid keyword: getaddrs' >&2; exit 1"]
)
def test_ranks_meet_at_the_address_of_the_first_node(
    run_job: RunJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, getaddrs: str
) -> None:
    """Before Slurm 23.11, scontrol has no getaddrs. Then ``show node`` provides the address."""
    scontrol = f"getaddrs*) {getaddrs};; *node*) echo 'A=n NodeAddr=10.0.0.7 B=1'"
    write_program(tmp_path / "bin" / "srun", f'echo "$MASTER_ADDR" >{tmp_path}/address; exit 7')
    monkeypatch.setenv("SLURM_CLUSTERS", "east")  # the job script must unset it
    run_job(scontrol)
    assert (tmp_path / "address").read_text() == "10.0.0.7\n"


@pytest.mark.parametrize("is_preempted", [False, True])
def test_a_preempted_job_is_requeued(
    run_job: RunJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_preempted: bool
) -> None:
    """If the partition has a GraceTime, Slurm ends only srun, and the job script continues.

    The same happens in a cancelled job, which must not be requeued. Only a preempted job has a
    PreemptTime.
    """
    preempt_time = "2026-11-30T22:26:04" if is_preempted else "None"
    job = f"A=1 PreemptEligibleTime=2026-11-30T22:25:58 PreemptTime={preempt_time} SuspendTime=None"
    requeue_mark = tmp_path / "requeued"
    scontrol = f"*job*) echo '{job}';; requeue*) touch {requeue_mark}"
    run_job(scontrol)
    assert requeue_mark.exists() == is_preempted
    requeue_mark.unlink(missing_ok=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "40")  # the default of cluster.max_requeues
    run_job(scontrol)
    assert not requeue_mark.exists()


def test_training_stops_before_the_limit_and_may_take_whole_nodes(prepare: Prepare) -> None:
    """A stage stops ``margin_seconds`` before the limit.

    By default, this is the planned time that the stage needs to stop, but at least
    ``MIN_MARGIN_SECONDS``. The last value of each case says whether jobs take whole nodes.
    """
    h100_flops, slow_flops = 9.89e14, 1e10  # per second; stopping is fast or slow
    cases = (("null", h100_flops, False), ("null", slow_flops, False), ("30", slow_flops, True))
    for margin, flops, exclusive in cases:
        plan, cluster = prepare(
            *("cluster=slurm", f"cluster.margin_seconds={margin}", "cluster.time=9-00:00:00"),
            f"cluster.exclusive={'true' if exclusive else 'null'}",
            *("hardware=h100", f"hardware.flops_per_second={flops}"),
            "stages.distill.limit_val_batches=3",
        )
        workload = stage_named(plan, "distill").workload
        assert workload is not None
        assert workload.validation_batches == 3
        planned_seconds = math.ceil(stopping_seconds(workload, plan.chain.hardware))
        assert (planned_seconds > MIN_MARGIN_SECONDS) == (flops == slow_flops)
        # Prune does not train, so it has the minimum.
        default_margins = {
            "distill": max(MIN_MARGIN_SECONDS, planned_seconds),
            "prune": MIN_MARGIN_SECONDS,
        }
        for name, default_margin in default_margins.items():
            script = slurm.job_script(stage_named(plan, name), cluster)
            expected = default_margin if margin == "null" else 30
            assert f"export STAGE_DEADLINE=$((end - {expected}))" in script, name
            assert ("--exclusive\n#SBATCH --mem=0\n" in script) == exclusive
        has_cpu_warning = "cpus-per-task" in {note.rule.name for note in plan.notes}
        assert has_cpu_warning != exclusive, "a whole node needs no cpus_per_task"


def test_forced_stage_is_complete_only_with_a_new_result(
    prepare: Prepare, plan: MakePlan, complete: Complete
) -> None:
    """A real shell runs the function ``complete`` of the job script."""
    complete(plan(*SLURM))
    planned, cluster = prepare(*SLURM, "force=[report]")
    stage = stage_named(planned, "report")
    script = slurm.job_script(stage, cluster)
    # The definition of ``complete`` and its variable ``stage``, followed by a call.
    check = script[script.index("stage=") : script.index("if complete")] + "complete"
    manifest = stage.directory / "manifest.json"

    def is_complete() -> bool:
        return subprocess.run(["bash", "-c", check], check=False).returncode == 0

    assert not is_complete()  # the result is the one to replace
    manifest.write_text(manifest.read_text().replace("2025-01-01", "2025-01-02"))  # started later
    assert is_complete()
    # The user once accepted a stale result. Its manifest has the planned fingerprint only there.
    acceptance = Acceptance(stage.fingerprint, ["its code changed"])
    edit_manifest(stage.directory, fingerprint="other", accepted=acceptance)
    assert not is_complete()
    manifest.unlink()
    assert not is_complete()


def test_a_cluster_that_only_sbatch_would_use_is_refused(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike sbatch, squeue and scancel read only ``SLURM_CLUSTERS``."""
    monkeypatch.setenv("SBATCH_CLUSTERS", "east")
    with pytest.raises(RecipeError, match="SBATCH_CLUSTERS=east"):
        prepare(*SLURM)
    monkeypatch.setenv("SLURM_CLUSTERS", "east")
    prepare(*SLURM)
