"""Submits a run to Slurm: one job for each stage. A job starts after the jobs of its inputs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from launch.cluster import Follow
from launch.executors import container
from launch.executors.slurm_limits import job_of, job_problems, read_partitions
from launch.plan import Plan
from launch.planned import ADOPT, RUN, SKIP, PlannedStage
from launch.slurm_queue import (
    MAX_COMPLETING_SECONDS,
    POLL_SECONDS,
    RECORD,
    STATE_REASONS,
    JobState,
    SlurmJob,
    job_name,
    job_states,
    query,
    read_jobs,
    run_hash,
    wait_for_completing_jobs,
)
from recipes.core.constraints import Count, CountOrZero, Duration, matching, one_of
from recipes.core.errors import RecipeError
from recipes.core.files import write_text_atomically
from recipes.core.screen import plain_table
from recipes.core.stage import SbatchOption
from recipes.core.stage_process import LOGS, failure, newest_log
from recipes.core.wheels import cache_dir
from recipes.engines.tensorrt_llm import LAUNCHER
from recipes.planning.limits import margin_seconds, slurm_seconds, stops_at_deadline
from recipes.planning.rules import Problem

SCRIPT = "job.sbatch"
SUBMIT = "submit.sh"
TEST_ONLY = "--test-only"
"""Option of ``submit.sh``: asks Slurm when the jobs could start, and submits none."""
START_ESTIMATE = re.compile(r"to start at (\S+) using (\d+) processors on nodes (\S+)")
"""Finds start time, CPUs and nodes in what ``sbatch --test-only`` prints about a valid job."""
RESTART_SECONDS = 900.0
"""How long to repeat requests that Slurm's controller, which may be restarting, does not answer."""
PLAIN = re.compile(r"[\w./@+=-]+")
"""Text that needs no quotes in sbatch options and in scripts."""
Name = Annotated[str, matching(r"[\w.,@+=-]+", "a name without spaces")]
Program = Annotated[str, matching(PLAIN.pattern, "one program, without spaces")]


@dataclass
class SlurmConfig(container.Containers):
    """Settings of ``cluster=slurm``."""

    executor: str = "slurm"
    partition: Name | None = None
    """Slurm's partition."""
    account: Name | None = None
    """Slurm's account."""
    qos: Name | None = None
    """Slurm's quality of service."""
    time: Duration = "04:00:00"
    """Time limit of a job, ``HH:MM:SS`` or ``D-HH:MM:SS``; ``resources.time`` replaces it."""
    cpu_partition: Name | None = None
    """Partition of stages that use no GPU; ``partition`` by default."""
    margin_seconds: Count | None = None
    """Training stops and saves this many seconds before the time limit. Default: the planned time
    of two steps, a validation and a checkpoint, but at least 300. In a search, the time to load the
    models is added."""
    max_requeues: CountOrZero = 40
    """How often a stage is started again after it stopped at its time limit or was preempted."""
    gpus: Annotated[str, one_of("gpus-per-node", "gres")] | None = "gpus-per-node"
    """How jobs request GPUs: ``gpus-per-node`` or ``gres``. ``null`` requests none, for nodes that
    are allocated whole or have no GPUs."""
    cpus_per_task: Count | None = None
    """CPUs on each node of a job, for all processes together. Jobs on whole nodes do not request
    CPUs."""
    exclusive: bool | None = None
    """Whether jobs take whole nodes with all of their memory; by default only jobs of several ranks
    do."""
    mpi: dict[str, str | None] = field(default_factory=dict)
    """Maps a stage module, such as ``build_engine``, to the command that starts TensorRT-LLM's
    programs, such as ``mpirun -n 1``. These programs spawn processes by MPI, even for one GPU, and
    Slurm's PMIx does not support that."""
    sbatch: list[SbatchOption] = field(default_factory=list)
    """Further options of sbatch; ``resources.sbatch`` adds options of one stage."""
    python: Program | None = None
    """Interpreter on the nodes; by default that of the launcher, or ``python`` of the image."""
    follow: bool = False
    """Waits for the submitted jobs and shows their progress."""


CONFIG = SlurmConfig


def prepare(plan: Plan, cluster: SlurmConfig) -> Plan:
    """Plans to ``ADOPT`` running and waiting jobs.

    Raises:
        RecipeError: A setting is invalid, or an active job conflicts with the plan.
    """
    container.require_usable(plan, cluster)
    container.require_stages("mpi", cluster.mpi)
    if problems := list(_settings_problems(plan.todo(), cluster)):
        raise RecipeError("\n".join(problems), fix="")
    active = wait_for_completing_jobs(plan.run_dir)
    new_jobs = {stage.name for stage in plan.todo() if stage.name not in active}
    stages = {stage.name: stage for stage in plan.stages}
    for name, (job, state) in active.items():
        reason = f"job {job.id} is {state.state.lower()}"
        # If ``only`` excludes a stage, it is not in ``stages``, but its job needs unchanged inputs.
        config, stage = plan.chain.stages.get(name), stages.get(name)
        new_inputs = sorted(new_jobs & set(config.inputs.values())) if config else []
        conflict = None
        if new_inputs:
            conflict = f", but {', '.join(new_inputs)} must run again before it"
        elif stage:
            conflict = _conflict(stage, job)
        if conflict is not None:
            raise RecipeError(
                f"{reason} for {name}{conflict}.",
                f"wait for it, or: python launch/run.py cancel run_dir={plan.run_dir}",
            )
        if stage is not None:
            stages[name] = replace(stage, action=ADOPT, reason=reason)
    return replace(plan, stages=tuple(stages.values()))


def _conflict(stage: PlannedStage, job: SlurmJob) -> str | None:
    """Returns the end of a message: why the job cannot make the planned result; otherwise, None."""
    if job.fingerprint != stage.fingerprint:
        return " with other settings, inputs or code"
    # A stage that runs although it has a result, such as a forced stage, must replace the result.
    old_result = stage.result if stage.action == RUN else None
    script = stage.directory / SCRIPT  # contains ``started_at`` of the result that it replaces
    text = script.read_text(encoding="utf-8") if script.exists() else ""
    if old_result is not None and old_result.started_at not in text:
        return ", but will not replace its result"
    return None


def problems(plan: Plan, cluster: SlurmConfig) -> Iterator[Problem]:
    """Yields problems of the jobs' requests; checks partitions only if Slurm is on this machine."""
    jobs = [
        job_of(stage, _sbatch_options(stage, cluster), stage.config.resources.time or cluster.time)
        for stage in plan.todo()
    ]
    # By stage. The launcher itself may set options that the user may not set.
    user_options = {s.name: [*cluster.sbatch, *s.config.resources.sbatch] for s in plan.todo()}
    return job_problems(jobs, user_options, read_partitions())


def _settings_problems(stages: Sequence[PlannedStage], cluster: SlurmConfig) -> Iterator[str]:
    """Yields a message for each setting that sbatch would refuse, or that would make jobs fail."""
    if not PLAIN.fullmatch(os.getcwd()):
        yield (
            f"the current directory {os.getcwd()} has a character that job options cannot hold\n"
            "  fix: work in a folder whose path has only letters, digits and ./@+=_-"
        )
    clusters = os.environ.get("SBATCH_CLUSTERS")
    if clusters and clusters != os.environ.get("SLURM_CLUSTERS"):
        yield (
            f"squeue and scancel do not read SBATCH_CLUSTERS={clusters}, so they would not find "
            "the jobs\n  fix: set SLURM_CLUSTERS instead, which all programs of Slurm read"
        )
    uses_launcher_python = cluster.python is None and any(stage.image is None for stage in stages)
    if uses_launcher_python and not PLAIN.fullmatch(sys.executable):
        yield (
            f"{sys.executable} has a character that job scripts cannot hold\n"
            "  fix: set cluster.python to an interpreter whose path has only letters, digits and "
            "./@+=_-"
        )
    for stage in stages:
        stage_limit = stage.config.resources.time
        key = f"stages.{stage.name}.resources.time" if stage_limit else "cluster.time"
        limit = stage_limit or cluster.time
        margin = margin_seconds(stage.name, stage.chain)
        if stops_at_deadline(stage.name, stage.chain) and slurm_seconds(limit) <= margin:
            yield (
                f"{key}={limit} is too short: {stage.name} stops {margin} s before the limit\n"
                "  fix: raise it, or set cluster.margin_seconds"
            )
        if not PLAIN.fullmatch(str(stage.directory)):
            yield (
                f"{stage.directory} has a character that job options cannot hold\n"
                "  fix: set run_dir to a path of letters, digits and ./@+=_-"
            )


def write_scripts(plan: Plan, cluster: SlurmConfig) -> None:
    """Writes a job script for every stage that will run, and a script that submits all of them."""
    for stage in plan.todo():
        (stage.directory / LOGS).mkdir(exist_ok=True)  # Slurm does not create it
        write_text_atomically(stage.directory / SCRIPT, job_script(stage, cluster))
    path = plan.run_dir / SUBMIT
    write_text_atomically(path, submit_script(plan))
    path.chmod(0o755)


def job_script(stage: PlannedStage, cluster: SlurmConfig) -> str:
    """Returns the text of a stage's ``job.sbatch``."""
    image, run_dir, old_result = stage.image, stage.directory.parent, stage.result
    needs_tensorrt_llm = stage.definition.needs_tensorrt_llm(stage.config, stage.chain)
    mpi = cluster.mpi.get(stage.config.stage) if needs_tensorrt_llm else None
    env = ({LAUNCHER: mpi} if mpi else {}) | container.environment(cluster, stage)
    return _render(
        "job.sbatch.j2",
        stage=stage,
        cluster=cluster,
        resources=stage.config.resources,
        devices=stage.devices,
        cpus_per_task=_cpus_per_task(stage, cluster),
        job_name=job_name(run_dir, stage.name),
        # From this start time, a forced stage's job knows the old manifest, which it must replace.
        replaces=old_result.started_at if old_result else None,
        cwd=os.getcwd(),
        time=stage.config.resources.time or cluster.time,
        sbatch=list(_sbatch_options(stage, cluster)),
        env=env,
        image=image,
        mounts=container.mounts_of(stage, cluster) if image else [],
        # These keep the job's values in the container. An image may replace all other variables.
        container_env=[*env, "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT"],
        home={name: value for name, value in container.home(stage).items() if name not in env},
        local_caches=container.LOCAL_CACHES if stage.definition.needs_torch else (),
        python=shlex.quote(cluster.python or ("python" if image else sys.executable)),
        mpi=mpi,
        margin_seconds=margin_seconds(stage.name, stage.chain),
    )


def _sbatch_options(stage: PlannedStage, cluster: SlurmConfig) -> Iterator[str]:
    """Yields the options of sbatch that the template of job scripts does not contain."""
    cpu_partition = None if stage.needs_gpu else cluster.cpu_partition
    partition = cpu_partition or cluster.partition
    named = {"partition": partition, "account": cluster.account, "qos": cluster.qos}
    yield from (f"--{name}={value}" for name, value in named.items() if value)
    if cluster.gpus and stage.needs_gpu:
        option = "gpus-per-node=" if cluster.gpus == "gpus-per-node" else "gres=gpu:"
        yield f"--{option}{stage.devices}"
    if cpus := _cpus_per_task(stage, cluster):
        yield f"--cpus-per-task={cpus}"
    user_options = (*cluster.sbatch, *stage.config.resources.sbatch)
    if _takes_whole_nodes(stage, cluster):
        yield "--exclusive"
        # sbatch refuses --mem together with --mem-per-cpu or --mem-per-gpu.
        if not any(option.startswith("--mem-per-") for option in user_options):
            yield "--mem=0"  # all memory of each node
    yield from user_options  # last, because sbatch uses the last value of a repeated option


def _takes_whole_nodes(stage: PlannedStage, cluster: SlurmConfig) -> bool:
    if cluster.exclusive is not None:
        return cluster.exclusive
    return stage.devices * stage.config.resources.nodes > 1


def _cpus_per_task(stage: PlannedStage, cluster: SlurmConfig) -> int | None:
    """Returns the CPUs to request from sbatch and srun; ``None`` requests none."""
    if _takes_whole_nodes(stage, cluster):
        return None  # a number would imply srun's --exact, so other CPUs would stay unused
    return stage.config.resources.cpus_per_task or cluster.cpus_per_task


def submit_script(plan: Plan) -> str:
    """Returns the text of ``submit.sh``, where each job depends on the jobs of its inputs."""
    # Includes adopted stages, on whose jobs new jobs may depend.
    pending = [stage for stage in plan.stages if stage.action != SKIP]
    job_variables = {stage.directory: "job_" + re.sub(r"\W", "_", stage.name) for stage in pending}
    jobs = []
    for stage in pending:
        inputs = {ref.directory for ref in stage.inputs.values()}
        # Complete inputs have no variable, and need no dependency.
        variables = sorted(job_variables[path] for path in inputs & job_variables.keys())
        # Such as afterok:$job_import_hf:$job_prune,singleton.
        afterok = "".join(f":${variable}" for variable in variables)
        dependency = f"afterok{afterok},singleton" if variables else "singleton"
        jobs.append((stage, job_variables[stage.directory], dependency))
    return _render(
        "submit.sh.j2",
        run_dir=plan.run_dir,
        record=RECORD,
        run_hash=run_hash(plan.run_dir),
        test_only=TEST_ONLY,
        max_completing_seconds=round(MAX_COMPLETING_SECONDS),
        jobs=jobs,
    )


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment, StrictUndefined  # here, because other executors do not need it

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    text = (Path(__file__).parent / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(values)


def dry_run(plan: Plan, console: Console) -> None:
    """Shows when Slurm could start each job; raises ``RecipeError`` if Slurm would refuse a job."""
    if query("scontrol", "ping").returncode:
        console.print("Slurm does not answer on this machine, so the jobs were not checked with it")
        return
    command = [str(plan.run_dir / SUBMIT), TEST_ONLY]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    title = "Slurm's answer for each job, if its inputs were complete"
    table = plain_table(title, "job", "could start", "CPUs", "nodes")
    refused: dict[str, list[str]] = {}  # names of stages, by Slurm's message
    for line in done.stdout.splitlines():
        stage_name, _, answer = line.partition(" ")
        if start := START_ESTIMATE.search(answer):
            table.add_row(stage_name, *start.groups())
        else:
            refused.setdefault(answer, []).append(stage_name)
    if table.rows:
        console.print(table)
    if refused:
        lines = [f"{', '.join(names)}: {answer}" for answer, names in refused.items()]
        raise RecipeError(
            "Slurm would refuse the jobs of\n" + "\n".join(lines),
            "change the settings of cluster; for the limits, run sinfo or scontrol show partition",
        )


def start(plan: Plan, cluster: SlurmConfig, follow: Follow, console: Console) -> bool:
    """Submits the jobs; waits for them if ``cluster.follow`` is set. Returns ``cluster.follow``."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    todo = plan.todo()
    if todo:
        _submit(plan)
    jobs = read_jobs(plan.run_dir)
    for stage in todo:
        console.print(f"{stage.name}: job {jobs[stage.name].id}")
    message = "submitted" if todo else "nothing to submit"
    console.print(f"{message}; see: python launch/run.py status run_dir={plan.run_dir}")
    if cluster.follow:
        for stage in plan.stages:
            if stage.action != SKIP:
                _follow(stage, jobs[stage.name], follow)
    return cluster.follow


def _submit(plan: Plan) -> None:
    """Runs ``submit.sh``; if the script fails, raises ``RecipeError`` with Slurm's message."""
    script, old_jobs = plan.run_dir / SUBMIT, read_jobs(plan.run_dir)
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    if done.returncode:
        jobs = read_jobs(plan.run_dir)
        # ``submit.sh`` stops at the first job that Slurm refuses.
        without_job = [s.name for s in plan.todo() if jobs.get(s.name) == old_jobs.get(s.name)]
        error = f"Slurm refused the job of {without_job[0]}" if without_job else f"{script} failed"
        raise RecipeError(
            f"{error}: {done.stderr.strip()}\n  jobs submitted before this error stay in the queue",
            f"change the settings of cluster and repeat the command; to retry unchanged: {script}",
        )


def _follow(stage: PlannedStage, job: SlurmJob, follow: Follow) -> None:
    """Shows a stage's progress until its job has ended; raises ``RecipeError`` if it failed."""
    with follow(stage) as follower:
        state = _state(job)
        while state is not None and state.active:
            time.sleep(POLL_SECONDS)
            follower.update()
            state = _state(job)
        follower.update()
        # A result alone does not prove success: a forced stage whose job fails still has its old
        # result with the same fingerprint.
        if stage.result is None or (state is not None and state.state != "COMPLETED"):
            end_state = f" ({state.state})" if state else ""
            reason = STATE_REASONS.get(state.state) if state else None
            log = newest_log(stage.directory)
            raise RecipeError(
                f"stage {stage.name}, job {job.id}, failed{end_state}: "
                f"{reason or failure(stage.directory, log)}\n  log: {log}",
                fix="",
            )


def _state(job: SlurmJob) -> JobState | None:
    """Returns a job's state; ``None`` if Slurm forgot the job. Waits if the controller restarts."""
    deadline = time.monotonic() + RESTART_SECONDS
    while True:
        try:
            return job_states([job]).get(job.id)
        except RecipeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)
