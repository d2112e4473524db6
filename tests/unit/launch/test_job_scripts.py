"""The job scripts of Slurm, and those that real shells run."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launch.executors import slurm
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import Acceptance
from recipes.planning.limits import MIN_MARGIN_SECONDS
from recipes.planning.training_cost import stopping_seconds
from tests.support.launcher import write_program
from tests.support.manifests import edit_manifest
from tests.unit.conftest import stage_named
from tests.unit.launch.conftest import SLURM

if TYPE_CHECKING:
    from tests.unit.conftest import Complete, MakePlan
    from tests.unit.launch.conftest import Prepare

GOLDEN = Path(__file__).with_name("golden")
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
FEW_STAGES = ("~stages.plan", "~stages.report.inputs.plan", "tasks=null", "engine=null")


def require_golden(text: str, name: str, tmp_path: Path) -> None:
    """Compares a script with the golden file, except for paths and hashes."""
    for path, word in ((tmp_path, "TMP"), (REPO_ROOT, "REPO")):
        text = text.replace(str(path), f"/{word}")
    text = re.sub(r"\b[0-9a-f]{64}\b", "FINGERPRINT", text)
    text = re.sub(r"(?<=[. ])[0-9a-f]{8}\b", "HASH", text)
    # Mounts are in the order of their real paths, which differ between machines.
    for mounts in re.findall(r"--container-mounts=(\S+)", text):
        text = text.replace(mounts, ",".join(sorted(mounts.split(","))))
    golden = GOLDEN / name
    if not golden.exists():
        golden.write_text(text)
    assert text == golden.read_text(), f"if this change is intended: rm {golden}, and run it again"


def test_scripts_equal_the_golden_files(prepare: Prepare, tmp_path: Path) -> None:
    """Compares a job on two nodes in containers, a job without a container, and ``submit.sh``."""
    plan, cluster = prepare(*TWO_NODES)
    text = slurm.job_script(stage_named(plan, "distill"), cluster)
    require_golden(text, "distill.sbatch", tmp_path)
    plan, cluster = prepare("cluster=slurm", "cluster.gpus=null", "cluster.python=python3.11")
    text = slurm.job_script(stage_named(plan, "prune"), cluster)
    require_golden(text, "prune.sbatch", tmp_path)
    plan, _ = prepare(*SLURM, "teacher=cached", *FEW_STAGES)
    text = slurm.submit_script(plan)
    require_golden(text, "submit.sh", tmp_path)
    [cache_line] = [line for line in text.splitlines() if "submit cache_logits" in line]
    [prune_line] = [line for line in text.splitlines() if "submit prune" in line]
    assert "job_prune" not in cache_line, "the two jobs do not wait for each other"
    assert "job_cache_logits" not in prune_line


def test_each_start_has_a_new_folder_for_compiled_kernels(prepare: Prepare, tmp_path: Path) -> None:
    """Runs the command that srun starts on a node. A fake Python records its variables, and fails.

    At the second start, its parent gets SIGTERM.
    """
    body = (
        f'env >>{tmp_path}/environment; mkdir "$TORCH_EXTENSIONS_DIR" || exit 1',
        f'[ ! -f {tmp_path}/second ] || kill -TERM "$PPID"; touch {tmp_path}/second; exit 7',
    )
    python = write_program(tmp_path / "python", "\n".join(body))
    plan, cluster = prepare(*SLURM, f"cluster.python={python}", "+cluster.env.TRITON_CACHE_DIR=/t")
    script = slurm.job_script(stage_named(plan, "prune"), cluster)
    [command] = re.findall(r"(?s)  (bash -c '.*') \|\|", script)
    for _ in range(2):
        assert subprocess.run(command, check=False, shell=True).returncode == 7
    variables = re.findall(r"(TORCH_EXT\w+|TRITON\w+)=(.+)", (tmp_path / "environment").read_text())
    folders = {Path(folder) for name, folder in variables if name == "TORCH_EXTENSIONS_DIR"}
    assert len(folders) == len(variables) == 2  # none for TRITON_CACHE_DIR, which the user sets
    assert not [folder for folder in folders if folder.parent.exists()]


@pytest.mark.parametrize("old", [False, True])
def test_ranks_meet_at_the_address_of_the_first_node(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    """Runs a job script with fake programs of Slurm. Before 23.11, scontrol has no getaddrs."""
    getaddrs = "echo 'invalid keyword: getaddrs' >&2; exit 1" if old else "echo 'n1: 10.0.0.7:6818'"
    scontrol = f"getaddrs*) {getaddrs};; *node*) echo 'A=n NodeAddr=10.0.0.7 B=1'"
    write_program(tmp_path / "bin" / "srun", f'echo "$MASTER_ADDR" >{tmp_path}/address; exit 7')
    monkeypatch.setenv("SLURM_CLUSTERS", "east")
    run_job(prepare, tmp_path, monkeypatch, scontrol)
    assert (tmp_path / "address").read_text() == "10.0.0.7\n"


@pytest.mark.parametrize("preempted", [False, True])
def test_a_preempted_job_is_requeued(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preempted: bool
) -> None:
    """With a GraceTime, Slurm ends srun and not the job script. A cancelled job ends likewise."""
    preempt_time = "2026-11-30T22:26:04" if preempted else "None"
    job = f"A=1 PreemptEligibleTime=2026-11-30T22:25:58 PreemptTime={preempt_time} SuspendTime=None"
    requeued = tmp_path / "requeued"
    write_program(tmp_path / "bin" / "srun", "exit 7")
    run_job(prepare, tmp_path, monkeypatch, f"*job*) echo '{job}';; requeue*) touch {requeued}")
    assert requeued.exists() == preempted
    requeued.unlink(missing_ok=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "40")
    run_job(prepare, tmp_path, monkeypatch, f"*job*) echo '{job}';; requeue*) touch {requeued}")
    assert not requeued.exists()


def run_job(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scontrol: str
) -> None:
    """Runs a job script with a fake scontrol and the test's fake srun, which exits with 7."""
    commands = f"*hostnames*) echo n1;; {scontrol};; *) echo n1: 127.0.0.1"
    own_cluster = '[ -z "${SLURM_CLUSTERS:-}" ] || exit 1'  # nodes may not know other clusters
    write_program(tmp_path / "bin" / "scontrol", f'{own_cluster}; case "$*" in {commands};; esac')
    write_program(tmp_path / "bin" / "sleep", "exit 0")
    job = {"JOB_ID": "7", "JOB_NODELIST": "n1", "JOB_END_TIME": "9999999999", "CPUS_ON_NODE": "4"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    plan, cluster = prepare(*SLURM)
    script = slurm.job_script(stage_named(plan, "prune"), cluster)
    assert subprocess.run(["bash", "-c", script], check=False).returncode == 7


def test_training_stops_before_the_limit_and_may_take_whole_nodes(prepare: Prepare) -> None:
    """The margin is the setting, or else the planned time of the last steps, at least a minimum."""
    for margin, flops, whole in (("null", 9.89e14, 0), ("null", 1e10, 0), ("30", 1e10, 1)):
        plan, cluster = prepare(
            *("cluster=slurm", f"cluster.margin_seconds={margin}", "cluster.time=9-00:00:00"),
            f"cluster.exclusive={'true' if whole else 'null'}",
            *("hardware=h100", f"hardware.flops_per_second={flops}"),
            "stages.distill.limit_val_batches=3",
        )
        workload = stage_named(plan, "distill").workload
        assert workload is not None
        assert workload.validation_batches == 3
        planned = math.ceil(stopping_seconds(workload, plan.chain.hardware))
        assert (planned > MIN_MARGIN_SECONDS) == (flops < 1e14)  # true for the slow device
        margins = {"distill": max(MIN_MARGIN_SECONDS, planned), "prune": MIN_MARGIN_SECONDS}
        for name, seconds in margins.items():
            text = slurm.job_script(stage_named(plan, name), cluster)
            expected = seconds if margin == "null" else 30
            assert f"export STAGE_DEADLINE=$((end - {expected}))" in text, name
            assert ("--exclusive\n#SBATCH --mem=0\n" in text) == bool(whole)
        warned = "cpus-per-task" in {note.rule.name for note in plan.notes}
        assert warned != bool(whole), "a whole node needs no cpus_per_task"


def test_forced_stage_is_complete_only_with_a_new_result(
    prepare: Prepare, plan: MakePlan, complete: Complete
) -> None:
    """A real shell runs the check that is part of the job script."""
    complete(plan(*SLURM))
    planned, cluster = prepare(*SLURM, "force=[report]")
    stage = stage_named(planned, "report")
    script = slurm.job_script(stage, cluster)
    check = script[script.index("stage=") : script.index("if complete")] + "complete"
    manifest = stage.directory / "manifest.json"

    def is_complete() -> bool:
        return subprocess.run(["bash", "-c", check], check=False).returncode == 0

    assert not is_complete()
    manifest.write_text(manifest.read_text().replace("2025-01-01", "2025-01-02"))  # started later
    assert is_complete()
    # An earlier acceptance of the result has the planned fingerprint, too.
    acceptance = Acceptance(stage.fingerprint, ["its code changed"])
    edit_manifest(stage.directory, fingerprint="other", accepted=acceptance)
    assert not is_complete()
    manifest.unlink()
    assert not is_complete()


def test_a_cluster_that_only_sbatch_would_use_is_refused(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_CLUSTERS", "east")
    with pytest.raises(RecipeError, match="SBATCH_CLUSTERS=east"):
        prepare(*SLURM)
    monkeypatch.setenv("SLURM_CLUSTERS", "east")
    prepare(*SLURM)
