"""Checks that Slurm jobs request enough for their processes, and no more than partitions allow."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from launch.planned import PlannedStage
from launch.slurm_queue import query
from recipes.core.errors import did_you_mean
from recipes.planning import rules
from recipes.planning.limits import slurm_seconds
from recipes.planning.rules import Problem
from recipes.planning.training_cost import gathering_bytes

SETTINGS = {
    "nodes": "nodes",
    "ntasks": "devices",
    "ntasks-per-node": "devices",
    "tasks-per-node": "devices",
    "gpus": "devices",
    "gpus-per-socket": "devices",
    "gpus-per-task": "devices",
    "tres-per-task": "devices",
    "cpus-per-gpu": "cpus_per_task",
    "cpus-per-task": "cpus_per_task",
    "time": "time",
}
"""For options of sbatch that the user may not set: the field of ``resources`` to set instead."""
OPTIONS = ("array", "chdir", "dependency", "error", "job-name", "no-requeue", "output")
"""Other options of sbatch that the launcher sets, so the user may not set them."""
HARMFUL = {
    "clusters": ("is unknown to squeue and scancel", "set the variable SLURM_CLUSTERS instead"),
    "signal": ("would kill training before it saves", "it stops before the time limit without it"),
}
"""For options of sbatch that would break a run: why they would, and what to do instead."""
CHECKED = ("exclusive", "gpus-per-node", "gres", "mem", "mem-per-cpu", "mem-per-gpu", "partition")
"""Options of sbatch that the user may set, and whose values are checked."""
SIZES = {"": 1, "K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
"""Slurm's units of memory, in megabytes. A number without a unit is in megabytes."""
MEGABYTE = 1024**2  # bytes of Slurm's megabyte
CLUSTER_MEMORY = re.compile(r"^(DefMemPer(?:Node|CPU))\s*= (\d+)$", re.M)
"""Matches the default memory of jobs in the output of ``scontrol show config``."""
CONVERSIONS = ("import_hf", "export_hf")
"""Modules of the stages that load their model with transformers, in float32 on the CPU."""
EVALUATIONS = ("evaluate", "evaluate_tasks")
"""Modules of the stages in which each rank loads the weights and builds a transformers model."""
RESOURCES = "stages.NAME.resources"
"""Name of a stage's ``resources`` in fixes."""


@dataclass(frozen=True)
class Job:
    """What a stage's job requests. A field is ``None`` if the job leaves it to Slurm's default."""

    stage: PlannedStage
    seconds: int
    """Time limit."""
    partition: str | None
    """A partition, or several separated by commas, from which Slurm chooses."""
    whole_nodes: bool
    gpus: int | None
    """GPUs per node."""
    cpus: int | None
    """CPUs per node."""
    memory_mb: float | None
    """Memory per node; 0 requests all memory of a node."""

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.stage.config.resources.nodes

    def __str__(self) -> str:
        """Describes the request, such as ``2 nodes with 8 GPUs, 64 CPUs``."""
        sizes = [_with_unit(self.gpus, "GPU")] if self.gpus else []
        sizes += [_with_unit(self.cpus, "CPU")] if self.cpus else []
        sizes += [f"{self.memory_mb / 1024:.0f} GB of memory"] if self.memory_mb else []
        return " with ".join(filter(None, [_with_unit(self.nodes, "node"), ", ".join(sizes)]))


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of a partition with equal hardware. All fields except ``count`` are per node."""

    count: int
    cpus: int
    memory_mb: int
    gpus: int


@dataclass(frozen=True)
class Partition:
    """A partition of Slurm with its limits and nodes."""

    fields: Mapping[str, str]
    """By name: what ``scontrol show partition`` prints, and defaults such as ``DefMemPerGPU``."""
    groups: Sequence[NodeGroup]

    @property
    def max_seconds(self) -> float:
        """Longest time limit of a job; infinity if the partition has no limit."""
        limit = self.fields.get("MaxTime", "")
        return slurm_seconds(limit) if ":" in limit else math.inf  # without a colon: UNLIMITED

    def limit(self, field: str) -> float:
        """Returns a numeric field; infinity if the field has no number, such as ``UNLIMITED``."""
        value = self.fields.get(field, "")
        return float(value) if value.isdigit() else math.inf

    def fitting_nodes(self, job: Job) -> int:
        """Returns the number of nodes that have what a job requests per node."""
        max_cpus, max_memory = self.limit("MaxCPUsPerNode"), self.limit("MaxMemPerNode")
        return sum(
            group.count
            for group in self.groups
            if group.gpus >= (job.gpus or 0)
            and min(group.cpus, max_cpus) >= self.cpus(job)
            and min(group.memory_mb, max_memory) >= (job.memory_mb or 0)
        )

    def cpus(self, job: Job) -> float:
        """Returns the smallest number of CPUs that a job gets on a node."""
        if job.cpus:
            return job.cpus
        per_gpu = self.limit("DefCpuPerGPU")
        return per_gpu * job.gpus if job.gpus and per_gpu < math.inf else 1

    def default_memory_mb(self, job: Job) -> float:
        """Returns the megabytes that a job gets on a node if it does not request memory.

        This is the smallest of the partition's defaults, or infinity if it has none.
        """
        # Slurm uses one of these defaults. Without GPUs, ``by_gpus`` is infinite: it has no effect.
        by_cpus = self.limit("DefMemPerCPU") * self.cpus(job)
        by_gpus = self.limit("DefMemPerGPU") * (job.gpus or math.inf)
        return min(self.limit("DefMemPerNode"), by_cpus, by_gpus)


Partitions = Mapping[str, Partition]  # by name


def job_of(stage: PlannedStage, options: Iterable[str], time: str) -> Job:
    """Returns what a stage's job requests with these options of sbatch, and this time limit."""
    # The last value of a repeated option counts, as for sbatch.
    values = dict(_parse_option(option) for option in options)
    per_node = values.get("gpus-per-node")  # such as 8, or h100:8
    gpu_requests = (values.get("gres"), per_node and f"gpu:{per_node}")
    counts = [count for count in map(_gpus, gpu_requests) if count is not None]
    # If the two counts differ, takes the count that differs more from the stage's devices. Then
    # ``_request_problems`` reports it.
    gpus = max(counts, key=lambda count: abs(count - stage.devices), default=None)
    cpus = int(values["cpus-per-task"]) if values.get("cpus-per-task", "").isdigit() else None
    memory = _megabytes(values.get("mem"))
    for option, count in (("mem-per-cpu", cpus), ("mem-per-gpu", gpus)):
        if memory is None and (size := _megabytes(values.get(option))) is not None:
            memory = size * (count or 1)  # each job gets at least one
    return Job(
        stage=stage,
        seconds=slurm_seconds(time),
        partition=values.get("partition") or os.environ.get("SBATCH_PARTITION"),
        # ``--exclusive`` with a value, such as ``user``, does not reserve whole nodes.
        whole_nodes=values.get("exclusive") == "",
        gpus=gpus,
        cpus=cpus,
        memory_mb=memory,
    )


def _with_unit(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def _parse_option(option: str) -> tuple[str, str]:
    """Returns an option's name and value: of ``--time=9``, of ``--time 9``, or of ``--exclusive``.

    An option without a value has an empty one. As in sbatch, ``dep`` abbreviates ``dependency``.
    """
    name, _, value = option.removeprefix("--").replace(" ", "=", 1).partition("=")
    known = {*SETTINGS, *OPTIONS, *HARMFUL, *CHECKED}
    matches = [full_name for full_name in known if full_name.startswith(name)]
    if name not in known and len(matches) == 1:
        name = matches[0]
    return name, value.strip()


def _megabytes(size: str | None) -> float | None:
    """Converts a size such as ``20G`` or ``9gb``; ``None`` if it is not set or not a size."""
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", (size or "").upper())
    return int(match[1]) * SIZES[match[2]] if match else None


def _gpus(gres: str | None) -> int | None:
    """Returns the number of GPUs in a list of Slurm's generic resources; ``None`` without GPUs.

    A job's request and a node have such a list, for example ``gpu:h100:8(S:0-1),tmp:10``.
    """
    without_sockets = re.sub(r"\(.*?\)|gres/", "", gres or "")  # such as gpu:h100:8,tmp:10
    counts = []
    for resource in without_sockets.split(","):
        name, *type_and_count = re.split("[:=]", resource)
        if name == "gpu":
            count = type_and_count[-1] if type_and_count else ""
            counts.append(int(count) if count.isdigit() else 1)  # "gpu" or "gpu:h100": one GPU
    return sum(counts) if counts else None


def job_problems(
    jobs: Iterable[Job], user_options: Mapping[str, Sequence[str]], partitions: Partitions
) -> Iterator[Problem]:
    """Yields the problems of jobs. A problem of several jobs is yielded once, with their stages.

    ``user_options`` has the options of sbatch in the user's settings, by stage. Without
    ``partitions``, limits are not checked.
    """
    stage_names: dict[Problem, list[str]] = {}
    for job in jobs:
        name = job.stage.name
        problems = list(_request_problems(job, user_options[name]))
        problems += _partition_problems(job, partitions) if partitions else []
        for problem in problems:
            stage_names.setdefault(problem, []).append(name)
    for problem, names in stage_names.items():
        yield replace(problem, what=f"{', '.join(names)}: {problem.what}")


def _request_problems(job: Job, user_options: Iterable[str]) -> Iterator[Problem]:
    """Yields options that the user may not set, and requests that do not fit the processes."""
    for option in user_options:
        name, _ = _parse_option(option)
        if name in OPTIONS:
            what = f"the option {option} of sbatch would override the launcher's {name}"
            yield Problem(rules.JOB, what, "remove it")
        if name in HARMFUL:
            why, instead = HARMFUL[name]
            what = f"the option {option} of sbatch {why}"
            yield Problem(rules.JOB, what, f"remove it; {instead}")
        if field := SETTINGS.get(name):
            what = f"the option {option} of sbatch would override resources.{field}"
            yield Problem(rules.JOB, what, f"remove it, and set {RESOURCES}.{field}")
    devices = job.stage.devices
    if job.stage.needs_gpu and job.gpus not in (None, devices):
        what = f"the job requests {job.gpus} GPUs per node, but uses {devices}"
        yield Problem(rules.JOB, what, f"remove GPUs from sbatch, and set {RESOURCES}.devices")
    processes = max(devices, getattr(job.stage.config, "processes", 1))
    if job.cpus is not None and job.cpus < processes:
        what = f"the job requests {job.cpus} CPUs per node, but starts {processes} processes"
        yield Problem(rules.JOB, what, f"set {RESOURCES}.cpus_per_task to {processes} or more")


def _partition_problems(job: Job, partitions: Partitions) -> Sequence[Problem]:
    """Returns the problems of a job in its partition, by default Slurm's default partition.

    If the job names several partitions, returns the problems in the one with the fewest problems.
    """
    default = [name for name, item in partitions.items() if item.fields["Default"] == "YES"]
    names = job.partition.split(",") if job.partition else default
    fix = f"set cluster.partition to one of: {', '.join(partitions)}"
    if not names:
        return [Problem(rules.PARTITION, "no partition is set, and Slurm has no default", fix)]
    if unknown := [name for name in names if name not in partitions]:
        hint = did_you_mean(unknown[0], partitions)
        return [Problem(rules.PARTITION, f"there is no partition {unknown[0]}.{hint}", fix)]
    return min((list(_limit_problems(job, partitions[name])) for name in names), key=len)


def _limit_problems(job: Job, partition: Partition) -> Iterator[Problem]:
    """Compares a job with the state, time limit, nodes and memory of one partition."""
    name, limit = partition.fields["PartitionName"], partition.fields["MaxTime"]
    if (state := partition.fields["State"]) != "UP":
        yield Problem(rules.PARTITION, f"partition {name} is {state}", "set another partition")
    if job.seconds > partition.max_seconds:
        what = f"the job requests {job.seconds / 3600:.1f} hours; partition {name} allows {limit}"
        fix = f"set cluster.time or {RESOURCES}.time to at most {limit}"
        yield Problem(rules.PARTITION, what, fix)
    min_nodes = partition.fields.get("MinNodes", "0")
    if job.nodes < int(min_nodes):
        nodes = _with_unit(job.nodes, "node")
        what = f"the job requests {nodes}; partition {name} requires at least {min_nodes}"
        yield Problem(rules.PARTITION, what, "set another partition")
    allowed = min(partition.fitting_nodes(job), partition.limit("MaxNodes"))
    if job.nodes > allowed:
        yield Problem(
            rules.PARTITION,
            f"the job requests {job}; partition {name} allows {allowed:.0f} such nodes",
            f"lower what it requests ({RESOURCES} or cluster), or set another partition",
        )
    yield from _memory_problems(job, partition)


def _memory_problems(job: Job, partition: Partition) -> Iterator[Problem]:
    """Compares a job's memory on a node with what loading a model and saving a checkpoint take."""
    workload = job.stage.workload
    if not (job.stage.needs_gpu or workload):  # such as a report
        return
    memory_mb = job.memory_mb
    if job.whole_nodes and not memory_mb:  # 0 or no request: all memory of the smallest node
        memory_mb = min((group.memory_mb for group in partition.groups), default=0)
    elif memory_mb is None:
        memory_mb = partition.default_memory_mb(job)
    # The keys say what takes memory, and the values are bytes. Only the largest item is compared.
    config, chain = job.stage.config, job.stage.chain
    needs: dict[str, float] = {"the model in bfloat16": 2 * chain.teacher.parameters()}
    if config.stage in CONVERSIONS:
        model = chain.shape_of(config.inputs.get("checkpoint"))
        needs = {"the model in float32": 4 * model.parameters()}
    elif config.stage in EVALUATIONS:
        ranks, is_bf16 = job.stage.devices, vars(config)["precision"] == "bf16-mixed"
        # The weights as read, in bfloat16, and the model that is built from the weights.
        bytes_per_parameter = 2 + (2 if is_bf16 else 4)
        size = ranks * bytes_per_parameter * chain.teacher.parameters()
        needs = {f"loading the model on {ranks} ranks": size}
    if workload is not None:
        ranks = workload.layout.devices
        needs[f"saving a checkpoint from {ranks} ranks"] = ranks * gathering_bytes(workload)
    purpose, needed_bytes = max(needs.items(), key=itemgetter(1))
    if 0 < memory_mb < needed_bytes / MEGABYTE:  # 0: all memory of a node, whose size is unknown
        yield Problem(
            rules.JOB_MEMORY,
            f"the job gets {memory_mb / 1024:.0f} GB of memory on a node, but {purpose} takes "
            f"{needed_bytes / MEGABYTE / 1024:.0f} GB",
            f"raise cluster.cpus_per_task, add --mem=SIZE to {RESOURCES}.sbatch, or split the "
            "model over more ranks",
        )


def read_partitions() -> Partitions:
    """Returns Slurm's partitions; empty if Slurm is not installed here or does not answer."""
    if shutil.which("sinfo") is None:
        return {}
    partitions = query("scontrol", "--oneliner", "show", "partition")
    # Defaults for partitions without a default, such as "DefMemPerCPU            = 4000".
    cluster_memory = dict(CLUSTER_MEMORY.findall(query("scontrol", "show", "config").stdout))
    # A line: partition, number of equal nodes; CPUs, MB of memory and generic resources of a node.
    nodes = query("sinfo", "--noheader", "--exact", "--format=%R|%D|%c|%m|%G")
    if partitions.returncode or nodes.returncode:
        return {}
    groups: dict[str, list[NodeGroup]] = {}
    for line in nodes.stdout.splitlines():
        name, count, cpus, memory, gres = line.split("|")
        group = NodeGroup(int(count), int(cpus), int(memory), _gpus(gres) or 0)
        groups.setdefault(name, []).append(group)
    result: dict[str, Partition] = {}
    for line in partitions.stdout.splitlines():
        fields = _parse_fields(line.split())
        fields |= _parse_fields(fields.get("JobDefaults", "").split(","))
        own_defaults = [fields.get(f"DefMemPer{unit}", "") for unit in ("Node", "CPU", "GPU")]
        if not any(default.isdigit() for default in own_defaults):
            fields |= cluster_memory
        if "PartitionName" in fields:  # else: "No partitions in the system"
            name = fields["PartitionName"]
            result[name] = Partition(fields, groups.get(name, ()))
    return result


def _parse_fields(words: Iterable[str]) -> dict[str, str]:
    """Parses words such as ``DefCpuPerGPU=8``."""
    return {name: value for name, _, value in (word.partition("=") for word in words)}
