"""Runs all stages on a real Slurm: dependencies, requeues, cancelled jobs and failed nodes."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from launch.executors.slurm import SUBMIT
from launch.lock import read_holder
from launch.run_status import read_statuses
from launch.slurm_queue import RECORD, active_jobs, read_jobs
from nemo_convert.convert import hf_weights
from nemo_convert.nemo import find_checkpoint
from recipes.core.manifest import ARTIFACT, MANIFEST, read_manifest
from recipes.core.metrics import METRICS, steps_of
from recipes.core.snapshot import CODE
from tests.slurm.cluster import NODES, SlurmCluster, run, wait_for
from tests.slurm.conftest import SECRET, STEPS, Run
from tests.support.contributing import copy_with
from tests.support.contributing import run as run_copy
from tests.support.in_process import run_in_process, run_successfully
from tests.support.launcher import CommandResult
from tests.support.runs import STAGES as ALL
from tests.support.runs import manifest_of

pytestmark = pytest.mark.timeout(1800)  # the first test waits for a whole run
STAGES = ALL[ALL.index("import_hf") :]
"""The stages of ``tiny_chain``, which has no stage ``plan``."""
FROM_DISTILL = STAGES[STAGES.index("distill") :]
"""``distill`` and all later stages."""
HOLD = "cluster.sbatch=[--hold]"
"""Override: jobs stay pending until they are released or cancelled."""


@pytest.fixture
def original(tiny_chain: tuple[Run, CommandResult]) -> Run:
    """The complete run, which tests do not change."""
    return tiny_chain[0]


@pytest.fixture
def imported(original: Run, tmp_path: Path) -> Run:
    """A copy of the run in which only ``import_hf`` is complete."""
    return original.copy_without(tmp_path, *STAGES[1:])


@pytest.fixture
def pruned(original: Run, tmp_path: Path) -> Run:
    """A copy of the run in which all stages before ``distill`` are complete."""
    return original.copy_without(tmp_path, *FROM_DISTILL)


def job_log(chain: Run, stage: str) -> str:
    """Returns the text of the log of a stage's newest job."""
    job = read_jobs(chain.directory)[stage]
    return (chain.directory / stage / "logs" / f"{job.id}.log").read_text()


def test_chain_runs_on_two_nodes(
    tiny_chain: tuple[Run, CommandResult], slurm: SlurmCluster
) -> None:
    chain, result = tiny_chain
    assert result.code == 0, result.output
    assert list(chain.states().values()) == ["complete"] * len(STAGES)
    assert f"{len(STAGES)} stages ran" in result.output
    for stage in STAGES:
        assert f"{stage}: complete" in result.output
    assert len(steps_of(chain.directory / "distill" / METRICS, "distill")) == STEPS
    event_files = chain.directory.glob("tensorboard/*/*/events.*")
    tracked_stages = {file.parts[-3] for file in event_files}  # tensorboard/STAGE/*/events.*
    assert tracked_stages == set(STAGES), "each job writes records for the tracker"
    if not slurm.has_containers:
        pytest.skip("containers need gcc, libslurm-dev and the right to mount")
    # Job id and node of each container that was started.
    containers = re.findall(r"job=(\d+) .*node=(\w+) image=\S+", slurm.pyxis_log.read_text())
    jobs = read_jobs(chain.directory)
    nodes = {
        stage: sorted(node for job, node in containers if job == jobs[stage].id) for stage in STAGES
    }
    assert nodes.pop("distill") == ["n1", "n2"]  # resources.nodes=2
    assert all(len(stage_nodes) == 1 for stage_nodes in nodes.values())


def test_secrets_are_in_no_file(tiny_chain: tuple[Run, CommandResult]) -> None:
    chain, result = tiny_chain
    assert result.code == 0
    # The job script passes the variable on by its name, without its value ``SECRET``.
    assert "HF_TOKEN" in (chain.directory / "distill" / "job.sbatch").read_text()
    grep = subprocess.run(["grep", "-rl", SECRET, chain.directory], check=False)
    assert grep.returncode == 1  # no file contains the secret


def test_status_and_logs_of_a_complete_run(original: Run) -> None:
    status = original.command("status")
    assert status.code == 0, status.output
    # The first two lines are the run directory and the column headers.
    rows = [line.split()[:3] for line in status.output.splitlines()[2:]]
    jobs = read_jobs(original.directory)
    assert rows == [[stage, "complete", jobs[stage].id] for stage in STAGES]
    log = original.command("logs", "stage=distill", "lines=3")
    # The first line is the log's path.
    assert log.output.splitlines()[1:] == job_log(original, "distill").strip().splitlines()[-3:]
    again = original.submit()
    assert "everything was complete, nothing ran" in again.output
    assert read_jobs(original.directory) == jobs


def test_weights_are_the_same_after_two_time_limits_and_edits_of_the_checkout(
    pruned: Run, original: Run, tmp_path: Path
) -> None:
    """Compares an interrupted and an uninterrupted distillation of three steps.

    Each start has time for one step. The first job trains step 1, is requeued, trains step 2, and
    stops, because it may be requeued only once. The second job trains step 3.

    A copy of the checkout submits the first job, which is held. Edits before its first start, and
    after its requeue, would make a stage fail that ran the copy instead of the run's snapshot.
    """
    uninterrupted = train_locally(original, tmp_path)
    checkout = copy_with(tmp_path / "checkout")
    overrides = (
        # The deadline is one second after the start: 10 minutes (600 s) minus the margin of 599 s.
        *("cluster.time=00:10:00", "cluster.margin_seconds=599", "only=[distill]"),
        # One rank on each of two nodes: as many ranks as ``train_locally`` starts on one machine.
        "stages.distill.resources.devices=1",
    )
    first_job = pruned.arguments(*overrides, "cluster.max_requeues=1", HOLD)
    submitted = run_copy(checkout, "launch/run.py", *first_job)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = read_jobs(pruned.directory)["distill"]
    edit(checkout, "core/worker")
    run("scontrol", "release", job.id)
    wait_for(lambda: "Restarts=1 " in run("scontrol", "show", "job", job.id), 300)
    edit(checkout, "distillation/training")
    edit(checkout, "stages/distill")
    pruned.wait()
    log = job_log(pruned, "distill")
    assert log.count("requeue 1 of 1") == 1
    assert f"stopped at the deadline; step 1 of {STEPS} is saved." in log
    distill = next(stage for stage in read_statuses(pruned.directory) if stage.name == "distill")
    assert distill.status == "stopped"
    assert distill.detail.startswith(f"stopped at the deadline; step 2 of {STEPS}")
    assert not (pruned.directory / "distill" / MANIFEST).exists()

    assert pruned.submit(*overrides).code == 0
    pruned.wait()
    assert pruned.states()["distill"] == "complete", job_log(pruned, "distill")
    # The second job was submitted from the unedited repository, which has the same snapshot.
    [snapshot] = (pruned.directory / CODE).iterdir()
    assert manifest_of(pruned.directory, "distill").snapshot == snapshot.name
    metrics = (pruned.directory / "distill" / METRICS).read_text()
    assert metrics.count('"task": "distill"') == STEPS, "no step ran twice"
    expected, actual = weights(uninterrupted), weights(pruned.directory)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def edit(checkout: Path, module: str) -> None:
    """Makes a module of ``recipes`` fail when it is imported."""
    file = checkout / "recipes" / f"{module}.py"
    file.write_text("raise SystemExit('edited')\n" + file.read_text())


def train_locally(original: Run, folder: Path) -> Path:
    """Distils in a copy of the run, on two ranks of this machine; returns the copy's directory."""
    copy = original.copy_without(folder / "local", *FROM_DISTILL).directory
    overrides = [word for word in original.overrides if not word.startswith("cluster")]
    # On Slurm a CPU trains in float32, because the launcher does not know the nodes' processors.
    # The local run must use the same precision.
    changes = ("stages.distill.resources.nodes=1", "hardware.precision='32'")
    run_successfully(*overrides, *changes, "only=[distill]", f"run_dir={copy}", cwd=folder)
    return copy


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of the distilled model, by their Hugging Face name."""
    return dict(hf_weights(find_checkpoint(run_dir / "distill" / ARTIFACT)))


def test_failing_stage_cancels_later_jobs(imported: Run, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    # The plan checks only the file's size, which the field "other" makes large enough. The stage
    # reads the field "text", which is too short.
    documents = [{"text": text, "other": "x" * 200_000} for text in ("one", "two")]
    short.write_text("".join(json.dumps(document) + "\n" for document in documents))
    submitted = imported.submit(f"data.sources=[{short}]")
    assert submitted.code == 0, submitted.output
    jobs = read_jobs(imported.directory)
    # The same command with ``follow`` submits no new jobs. It waits for the active ones.
    followed = imported.submit(f"data.sources=[{short}]", "cluster.follow=true")
    assert read_jobs(imported.directory) == jobs
    assert followed.code == 1
    assert "stage prepare_data, job" in followed.output
    assert "too little text for seq_length=64" in followed.output
    imported.wait()
    expected = {"import_hf": "complete", "prepare_data": "failed"}
    assert imported.states() == expected | dict.fromkeys(STAGES[2:], "cancelled")
    status = imported.command("status")
    assert status.code == 0
    assert "too little text for seq_length=64" in status.output
    assert "too little text" in imported.command("logs").output


def test_a_job_survives_a_failed_node_and_cancel_keeps_the_result(
    original: Run, imported: Run
) -> None:
    """After one of a job's two nodes fails, Slurm requeues the job. A second job is cancelled."""
    overrides = ("stages.prepare_data.resources.nodes=2", "only=[prepare_data]")
    assert imported.submit(*overrides).code == 0
    [node, _] = run("scontrol", "show", "hostnames", wait_for_nodes(imported)).split()
    job = read_jobs(imported.directory)["prepare_data"]
    run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    # ``wait`` could return early: for a moment the job is neither active nor in the queue.
    wait_for(lambda: imported.states()["prepare_data"] == "complete", 600)
    requeued = run("scontrol", "show", "job", job.id)
    assert "Restarts=1 " in requeued
    assert "NumNodes=2 " in requeued
    imported.wait()
    wait_for(lambda: run("sinfo", "-hN", "-o", "%T").split() == ["idle"] * NODES, 300)
    one_node, two_nodes = (
        {
            file.name: file.read_bytes()
            for file in (each_run.directory / "prepare_data" / ARTIFACT).iterdir()
        }
        for each_run in (original, imported)
    )
    assert one_node == two_nodes
    assert len(one_node["train.bin"]) > 100_000, "there is enough text for two nodes"

    manifest = read_manifest(imported.directory / "prepare_data")
    assert imported.submit(*overrides, "force=[prepare_data]").code == 0
    wait_for_nodes(imported)
    assert imported.states()["prepare_data"] == "running"
    cancelled = imported.command("cancel")
    assert cancelled.code == 0
    assert "prepare_data: job" in cancelled.output
    imported.wait()
    assert read_manifest(imported.directory / "prepare_data") == manifest


def wait_for_nodes(chain: Run) -> str:
    """Waits until the run's only job has started; returns the job's nodes, such as ``n[1-2]``."""

    def nodes() -> str:  # empty until the job runs
        job_states = [state for _, state in active_jobs(chain.directory).values()]
        return job_states[0].nodes if job_states and job_states[0].state == "RUNNING" else ""

    wait_for(nodes, 300)
    return nodes()


def test_second_submission_keeps_jobs_and_cancel_cancels_all(pruned: Run, tmp_path: Path) -> None:
    def config_times() -> dict[str, int]:
        """Returns when each stage's ``config.yaml`` was written, in ns: submission writes it."""
        files = {stage: pruned.directory / stage / "config.yaml" for stage in FROM_DISTILL}
        return {stage: file.stat().st_mtime_ns for stage, file in files.items()}

    assert pruned.submit(HOLD).code == 0
    jobs = read_jobs(pruned.directory)
    assert list(jobs) == FROM_DISTILL
    record, times = (pruned.directory / RECORD).read_text(), config_times()

    again = pruned.submit(HOLD)
    assert again.code == 0, again.output
    assert again.output.count("is pending") == len(jobs)
    assert (pruned.directory / RECORD).read_text() == record
    # After one job is cancelled, only this job is submitted again.
    run("scancel", jobs["report"].id)
    assert pruned.submit(HOLD).code == 0
    new_jobs = read_jobs(pruned.directory)
    assert [stage for stage in jobs if new_jobs[stage] != jobs[stage]] == ["report"]
    report_job = run("scontrol", "show", "job", new_jobs["report"].id)
    assert f"afterok:{jobs['export_hf'].id}" in report_job
    new_times = config_times()
    assert [stage for stage in jobs if new_times[stage] != times[stage]] == ["report"]

    changed = pruned.submit(HOLD, "stages.distill.lr=5e-4")
    assert changed.code == 1
    assert f"job {jobs['distill'].id} is pending for distill with other settings" in changed.output
    overrides = [word for word in pruned.overrides if not word.startswith("cluster")]
    local = run_in_process(
        *overrides,
        f"run_dir={pruned.directory}",
        "stages.distill.resources.nodes=1",
        cwd=tmp_path,
    )
    assert local.code == 1
    assert f"job {jobs['distill'].id} is pending for distill of this run" in local.output

    assert pruned.command("cancel").code == 0
    wait_for(lambda: not active_jobs(pruned.directory), 120)
    assert {pruned.states()[stage] for stage in FROM_DISTILL} == {"cancelled"}
    assert "nothing runs" in pruned.command("cancel").output


def test_refused_job_is_named_and_earlier_jobs_stay(pruned: Run, tmp_path: Path) -> None:
    # No node has the feature "elsewhere", so Slurm refuses the job of ``export_hf``.
    refused = pruned.submit(HOLD, "stages.export_hf.resources.sbatch=['--constraint=elsewhere']")
    assert refused.code == 1
    assert "Slurm refused the job of export_hf" in refused.output
    assert "Invalid feature specification" in refused.output
    accepted = read_jobs(pruned.directory)
    assert list(accepted) == ["distill", "evaluate"]  # the stages before ``export_hf``
    by_hand = subprocess.run([pruned.directory / SUBMIT], capture_output=True, text=True)
    assert "Invalid feature specification" in by_hand.stderr
    assert read_jobs(pruned.directory) == accepted
    again = pruned.submit(HOLD)
    assert again.code == 0, again.output
    record = (pruned.directory / RECORD).read_text()
    assert list(read_jobs(pruned.directory)) == FROM_DISTILL
    assert accepted.items() <= read_jobs(pruned.directory).items()
    # Run by hand, the script also skips the jobs that are in the record.
    output = run(str(pruned.directory / SUBMIT))
    assert output.count(accepted["distill"].id) == 1
    assert (pruned.directory / RECORD).read_text() == record

    def is_followed() -> bool:
        holder = read_holder(pruned.directory)
        return holder is not None and holder.stage == "distill"

    def cancel_followed_job() -> None:
        # If the job were cancelled before the launcher follows it, it would be submitted again.
        wait_for(is_followed, 300)
        run("scancel", accepted["distill"].id)

    threading.Thread(target=cancel_followed_job).start()
    followed = pruned.submit(HOLD, "cluster.follow=true")
    assert followed.code == 1
    assert f"job {accepted['distill'].id}, failed (CANCELLED): it was cancelled" in followed.output
    assert pruned.command("cancel").code == 0


def test_runs_of_a_sweep_share_their_inputs(original: Run, tmp_path: Path) -> None:
    """Two runs differ only in the report's title. Their inputs are stages of another run."""
    inputs = OmegaConf.load(original.directory / "report" / "config.yaml").config.inputs
    shared = [
        f"stages.report.inputs.{name}={original.directory / stage}"
        for name, stage in inputs.items()
    ]
    sweep_overrides = ("only=[report]", *shared, "stages.report.title=one,two")
    run_successfully("-m", *original.overrides, *sweep_overrides, cwd=tmp_path)
    [sweep] = (tmp_path / "runs" / "sweeps").iterdir()
    runs = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert len(runs) == 2
    wait_for(lambda: not any(active_jobs(directory) for directory in runs), 300)
    status = run_in_process("status", f"run_dir={sweep}", cwd=tmp_path)
    assert status.output.count("complete") == 2, status.output
    titles = [manifest_of(directory, "report").config["title"] for directory in runs]
    assert titles == ["one", "two"]
