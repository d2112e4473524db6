"""Runs all stages on a real Slurm: dependencies, requeues, cancelled jobs and failed nodes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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

pytestmark = pytest.mark.timeout(1800)  # the first test waits for a whole run
STAGES = ALL[ALL.index("import_hf") :]
"""The stages of ``tiny_chain``, which has no stage ``plan``."""
FROM_DISTILL = STAGES[STAGES.index("distill") :]
"""``distill`` and all later stages."""


def states(chain: Run) -> dict[str, str]:
    """Returns the status of each stage, such as ``complete``, by stage."""
    return {stage.name: stage.status for stage in read_statuses(chain.directory)}


def job_log(chain: Run, stage: str) -> str:
    """Returns the text of the log of a stage's newest job."""
    job = read_jobs(chain.directory)[stage]
    return (chain.directory / stage / "logs" / f"{job.id}.log").read_text()


def test_chain_runs_on_two_nodes(
    tiny_chain: tuple[Run, CommandResult], slurm: SlurmCluster
) -> None:
    chain, result = tiny_chain
    assert result.code == 0, result.output
    assert list(states(chain).values()) == ["complete"] * len(STAGES)
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


def test_status_and_logs_of_a_complete_run(tiny_chain: tuple[Run, CommandResult]) -> None:
    chain, _ = tiny_chain
    status = chain.command("status")
    assert status.code == 0, status.output
    # The first two lines are the run directory and the column headers.
    rows = [line.split()[:3] for line in status.output.splitlines()[2:]]
    jobs = read_jobs(chain.directory)
    assert rows == [[stage, "complete", jobs[stage].id] for stage in STAGES]
    log = chain.command("logs", "stage=distill", "lines=3")
    # The first line is the log's path.
    assert log.output.splitlines()[1:] == job_log(chain, "distill").strip().splitlines()[-3:]
    again = chain.submit()
    assert "everything was complete, nothing ran" in again.output
    assert read_jobs(chain.directory) == jobs


def test_two_nodes_tokenize_to_the_same_bytes_as_one(
    tiny_chain: tuple[Run, CommandResult], tmp_path: Path
) -> None:
    original, _ = tiny_chain
    chain = original.copy_without(tmp_path, *STAGES[1:])
    assert chain.submit("stages.prepare_data.resources.nodes=2", "only=[prepare_data]").code == 0
    chain.wait()
    assert states(chain)["prepare_data"] == "complete", job_log(chain, "prepare_data")
    job = read_jobs(chain.directory)["prepare_data"]
    assert "NumNodes=2 " in run("scontrol", "show", "job", job.id)
    one_node, two_nodes = (
        {
            file.name: file.read_bytes()
            for file in (each_run.directory / "prepare_data" / ARTIFACT).iterdir()
        }
        for each_run in (original, chain)
    )
    assert one_node == two_nodes
    assert len(one_node["train.bin"]) > 100_000, "there is enough text for two nodes"


def test_training_that_reached_its_limit_twice_has_the_same_weights(
    tiny_chain: tuple[Run, CommandResult], tmp_path: Path
) -> None:
    """Compares an interrupted and an uninterrupted distillation of three steps.

    Each start has time for one step. The first job trains step 1, is requeued, trains step 2, and
    stops, because it may be requeued only once. The second job trains step 3.
    """
    original, _ = tiny_chain
    chain = original.copy_without(tmp_path, *FROM_DISTILL)
    uninterrupted = train_locally(original, tmp_path)
    # The deadline is one second after the start: 10 minutes (600 s) minus the margin of 599 s.
    overrides = ("cluster.time=00:10:00", "cluster.margin_seconds=599", "only=[distill]")
    # One rank on each of two nodes: as many ranks as ``train_locally`` starts on one machine.
    overrides += ("stages.distill.resources.devices=1",)
    assert chain.submit(*overrides, "cluster.max_requeues=1").code == 0
    chain.wait()
    log = job_log(chain, "distill")
    assert log.count("requeue 1 of 1") == 1
    assert f"stopped at the deadline; step 1 of {STEPS} is saved." in log
    distill = next(stage for stage in read_statuses(chain.directory) if stage.name == "distill")
    assert distill.status == "stopped"
    assert distill.detail.startswith(f"stopped at the deadline; step 2 of {STEPS}")
    assert not (chain.directory / "distill" / MANIFEST).exists()

    assert chain.submit(*overrides).code == 0
    chain.wait()
    assert states(chain)["distill"] == "complete", job_log(chain, "distill")
    metrics = (chain.directory / "distill" / METRICS).read_text()
    assert metrics.count('"task": "distill"') == STEPS, "no step ran twice"
    expected, actual = weights(uninterrupted), weights(chain.directory)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_edits_after_submission_and_between_requeues_do_not_affect_the_job(
    tiny_chain: tuple[Run, CommandResult], tmp_path: Path
) -> None:
    """The edits would make a stage fail that ran the checkout instead of the run's snapshot.

    Each start of the job has time for one of the three steps. The job is held, edits of the
    checkout precede its first start, and more edits follow each requeue.
    """
    original, _ = tiny_chain
    chain = original.copy_without(tmp_path, *FROM_DISTILL)
    checkout = copy_with(tmp_path / "checkout")
    arguments = chain.arguments(
        "cluster.time=00:10:00",
        "cluster.margin_seconds=599",
        "only=[distill]",
        "stages.distill.resources.devices=1",
        "cluster.sbatch=[--hold]",
        "skip_rules=[cluster-hardware]",
    )
    submitted = run_copy(checkout, "launch/run.py", *arguments)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    [snapshot] = (chain.directory / CODE).iterdir()
    job = read_jobs(chain.directory)["distill"]
    for restarts, module in enumerate(("core/worker", "distillation/training", "stages/distill")):
        wait_for(
            lambda count=restarts: f"Restarts={count} " in run("scontrol", "show", "job", job.id),
            300,
        )
        file = checkout / "recipes" / f"{module}.py"
        file.write_text("raise SystemExit('edited')\n" + file.read_text())
        if restarts == 0:  # the job is still held, because of --hold
            run("scontrol", "release", job.id)
    wait_for(lambda: states(chain)["distill"] == "complete", 300)
    distill = read_manifest(chain.directory / "distill")
    assert distill is not None
    assert distill.snapshot == snapshot.name
    assert job_log(chain, "distill").count("stopped at the deadline; requeue") == STEPS - 1


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


def test_failing_stage_cancels_later_jobs(
    tiny_chain: tuple[Run, CommandResult], tmp_path: Path
) -> None:
    original, _ = tiny_chain
    chain = original.copy_without(tmp_path, *STAGES[1:])
    short = tmp_path / "short.jsonl"
    # The plan checks only the file's size, which the field "other" makes large enough. The stage
    # reads the field "text", which is too short.
    documents = [{"text": text, "other": "x" * 200_000} for text in ("one", "two")]
    short.write_text("".join(json.dumps(document) + "\n" for document in documents))
    submitted = chain.submit(f"data.sources=[{short}]")
    assert submitted.code == 0, submitted.output
    jobs = read_jobs(chain.directory)
    # The same command with ``follow`` submits no new jobs. It waits for the active ones.
    followed = chain.submit(f"data.sources=[{short}]", "cluster.follow=true")
    assert read_jobs(chain.directory) == jobs
    assert followed.code == 1
    assert "stage prepare_data, job" in followed.output
    assert "too little text for seq_length=64" in followed.output
    chain.wait()
    expected = {"import_hf": "complete", "prepare_data": "failed"}
    assert states(chain) == expected | dict.fromkeys(STAGES[2:], "cancelled")
    status = chain.command("status")
    assert status.code == 0
    assert "too little text for seq_length=64" in status.output
    assert "too little text" in chain.command("logs").output


def test_a_job_survives_a_failed_node_and_cancel_keeps_the_result(
    tiny_chain: tuple[Run, CommandResult], tmp_path: Path
) -> None:
    """Slurm requeues the job of a failed node. A cancelled second job keeps the first result."""
    original, _ = tiny_chain
    chain = original.copy_without(tmp_path, *STAGES[1:])
    assert chain.submit("only=[prepare_data]").code == 0
    node = wait_for_node(chain)
    run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    # ``chain.wait`` could return early: for a moment the job is neither active nor in the queue.
    wait_for(lambda: states(chain)["prepare_data"] == "complete", 600)
    job = read_jobs(chain.directory)["prepare_data"]
    assert "Restarts=1 " in run("scontrol", "show", "job", job.id)
    chain.wait()
    wait_for(lambda: run("sinfo", "-hN", "-o", "%T").split() == ["idle"] * NODES, 300)

    manifest = read_manifest(chain.directory / "prepare_data")
    assert chain.submit("only=[prepare_data]", "force=[prepare_data]").code == 0
    wait_for_node(chain)
    assert states(chain)["prepare_data"] == "running"
    cancelled = chain.command("cancel")
    assert cancelled.code == 0
    assert "prepare_data: job" in cancelled.output
    chain.wait()
    assert read_manifest(chain.directory / "prepare_data") == manifest


def wait_for_node(chain: Run) -> str:
    """Waits until the run's only job has started; returns the name of the job's node."""

    def node() -> str:  # empty until the job runs
        job_states = [state for _, state in active_jobs(chain.directory).values()]
        return job_states[0].nodes if job_states and job_states[0].state == "RUNNING" else ""

    wait_for(node, 300)
    return node()


def test_second_submission_keeps_jobs_and_cancel_cancels_all(
    tiny_chain: tuple[Run, CommandResult], tmp_path: Path
) -> None:
    original, _ = tiny_chain
    chain = original.copy_without(tmp_path, *FROM_DISTILL)
    hold = "cluster.sbatch=[--hold]"

    def config_times() -> dict[str, int]:
        """Returns when each stage's ``config.yaml`` was written, in ns: submission writes it."""
        files = {stage: chain.directory / stage / "config.yaml" for stage in FROM_DISTILL}
        return {stage: file.stat().st_mtime_ns for stage, file in files.items()}

    assert chain.submit(hold).code == 0
    jobs = read_jobs(chain.directory)
    assert list(jobs) == FROM_DISTILL
    record, times = (chain.directory / RECORD).read_text(), config_times()

    again = chain.submit(hold)
    assert again.code == 0, again.output
    assert again.output.count("is pending") == len(jobs)
    assert (chain.directory / RECORD).read_text() == record
    # After one job is cancelled, only this job is submitted again.
    run("scancel", jobs["report"].id)
    assert chain.submit(hold).code == 0
    new_jobs = read_jobs(chain.directory)
    assert [stage for stage in jobs if new_jobs[stage] != jobs[stage]] == ["report"]
    report_job = run("scontrol", "show", "job", new_jobs["report"].id)
    assert f"afterok:{jobs['export_hf'].id}" in report_job
    new_times = config_times()
    assert [stage for stage in jobs if new_times[stage] != times[stage]] == ["report"]

    changed = chain.submit(hold, "stages.distill.lr=5e-4")
    assert changed.code == 1
    assert f"job {jobs['distill'].id} is pending for distill with other settings" in changed.output
    overrides = [word for word in chain.overrides if not word.startswith("cluster")]
    local = run_in_process(
        *overrides, f"run_dir={chain.directory}", "stages.distill.resources.nodes=1", cwd=tmp_path
    )
    assert local.code == 1
    assert f"job {jobs['distill'].id} is pending for distill of this run" in local.output

    assert chain.command("cancel").code == 0
    wait_for(lambda: not active_jobs(chain.directory), 120)
    assert {states(chain)[stage] for stage in FROM_DISTILL} == {"cancelled"}
    assert "nothing runs" in chain.command("cancel").output


def test_refused_job_is_named_and_earlier_jobs_stay(
    tiny_chain: tuple[Run, CommandResult], tmp_path: Path
) -> None:
    original, _ = tiny_chain
    chain = original.copy_without(tmp_path, *FROM_DISTILL)
    hold = "cluster.sbatch=[--hold]"
    # No node has the feature "elsewhere", so Slurm refuses the job of ``export_hf``.
    refused = chain.submit(hold, "stages.export_hf.resources.sbatch=['--constraint=elsewhere']")
    assert refused.code == 1
    assert "Slurm refused the job of export_hf" in refused.output
    assert "Invalid feature specification" in refused.output
    accepted = read_jobs(chain.directory)
    assert list(accepted) == ["distill", "evaluate"]  # the stages before ``export_hf``
    by_hand = subprocess.run([chain.directory / SUBMIT], capture_output=True, text=True)
    assert "Invalid feature specification" in by_hand.stderr
    assert read_jobs(chain.directory) == accepted
    again = chain.submit(hold)
    assert again.code == 0, again.output
    record = (chain.directory / RECORD).read_text()
    assert list(read_jobs(chain.directory)) == FROM_DISTILL
    assert accepted.items() <= read_jobs(chain.directory).items()
    # Run by hand, the script also skips the jobs that are in the record.
    output = run(str(chain.directory / SUBMIT))
    assert output.count(accepted["distill"].id) == 1
    assert (chain.directory / RECORD).read_text() == record

    def is_followed() -> bool:
        holder = read_holder(chain.directory)
        return holder is not None and holder.stage == "distill"

    def cancel_followed_job() -> None:
        # If the job were cancelled before the launcher follows it, it would be submitted again.
        wait_for(is_followed, 300)
        run("scancel", accepted["distill"].id)

    threading.Thread(target=cancel_followed_job).start()
    followed = chain.submit(hold, "cluster.follow=true")
    assert followed.code == 1
    assert f"job {accepted['distill'].id}, failed (CANCELLED): it was cancelled" in followed.output
    assert chain.command("cancel").code == 0


def test_runs_of_a_sweep_share_their_inputs(
    tiny_chain: tuple[Run, CommandResult], tmp_path: Path
) -> None:
    """Three runs differ only in the report's title. Their inputs are stages of another run."""
    original, _ = tiny_chain
    inputs = OmegaConf.load(original.directory / "report" / "config.yaml").config.inputs
    shared = [
        f"stages.report.inputs.{name}={original.directory / stage}"
        for name, stage in inputs.items()
    ]
    sweep_overrides = ("only=[report]", *shared, "stages.report.title=one,two,three")
    run_successfully("-m", *original.overrides, *sweep_overrides, cwd=tmp_path)
    [sweep] = (tmp_path / "runs" / "sweeps").iterdir()
    runs = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert len(runs) == 3
    wait_for(lambda: not any(active_jobs(directory) for directory in runs), 300)
    status = run_in_process("status", f"run_dir={sweep}", cwd=tmp_path)
    assert status.output.count("complete") == 3, status.output
    titles = [read_manifest(directory / "report").config["title"] for directory in runs]  # type: ignore[union-attr]
    assert titles == ["one", "two", "three"]


def test_every_script_passes_shellcheck(tiny_chain: tuple[Run, CommandResult]) -> None:
    chain, _ = tiny_chain
    scripts = [*chain.directory.glob("*/job.sbatch"), chain.directory / SUBMIT]
    assert len(scripts) == len(STAGES) + 1  # one per stage, and the script that submits all
    subprocess.run([Path(sys.executable).with_name("shellcheck"), *scripts], check=True)
    assert os.access(scripts[-1], os.X_OK)
