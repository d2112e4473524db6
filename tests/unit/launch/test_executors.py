"""Scripts for docker and Slurm, and plans that these executors refuse."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from launch import machine
from launch.executors import container, docker, executor_of, local, slurm
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import Acceptance
from recipes.core.wheels import cache_dir
from recipes.planning.limits import MIN_MARGIN_SECONDS
from recipes.planning.training_cost import stopping_seconds
from tests.support.launcher import write_program
from tests.support.manifests import edit_manifest
from tests.support.text import write_token_files
from tests.unit.conftest import SMALL_STUDENT, complete_overrides, stage_named

if TYPE_CHECKING:
    from launch.plan import Plan
    from tests.unit.conftest import Complete, Compose, MakePlan

GOLDEN = Path(__file__).with_name("golden")
RECIPE = "recipe=llama_width_prune"
SLURM = ("cluster=slurm", "hardware=h100")
DOCKER = ("cluster=docker", "hardware=h100")
ENGINE_IMAGE = "cluster.images.tensorrt_llm=engine:1"
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
Prepare = Callable[..., tuple["Plan", Any]]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the working directory and the cache, whose paths are in the scripts."""
    for folder in ("home", "cache"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "home")
    for name in ("NEMO_RECIPES_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    for name in machine.HUB_FOLDERS:
        monkeypatch.delenv(name, raising=False)
    write_program(tmp_path / "bin" / "docker", "exit 0")  # a docker that has every image
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)


@pytest.fixture
def prepare(compose: Compose, plan: MakePlan) -> Prepare:
    """Returns a function that plans a run and lets the executor check the plan."""

    def prepare(*overrides: str) -> tuple[Plan, Any]:
        executor, cluster = executor_of(compose(*complete_overrides(RECIPE, overrides)).cluster)
        checked = executor.prepare(plan(*overrides), cluster)
        for stage in checked.stages:
            stage.directory.mkdir(parents=True, exist_ok=True)
        return checked, cluster

    return prepare


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


@pytest.mark.parametrize(
    ("engine", "gpus", "option"),
    [("openvino", "gres", "gres=gpu:1"), ("tensorrt_llm", "gpus-per-node", "gpus-per-node=1")],
)
def test_jobs_get_gpus_mpi_and_torchrun_only_if_their_stage_needs_them(
    prepare: Prepare, engine: str, gpus: str, option: str
) -> None:
    """Engines of TensorRT-LLM are built and timed on a GPU, with MPI; OpenVINO's are not."""
    site = (*SLURM, "cluster.partition=gpu", "cluster.cpu_partition=cpu", f"cluster.gpus={gpus}")
    served = ("served=engine", "stages.evaluate_served.tasks=[gsm8k_cot]")
    plan, cluster = prepare(*site, f"engine={engine}", ENGINE_IMAGE, *served)
    engine_stages = {"build_engine", "build_teacher_engine", "measure_speed"}
    on_cpu = {"plan", "prepare_data", "report", *(engine_stages if engine == "openvino" else ())}
    for stage in plan.stages:
        text, needs_gpu = slurm.job_script(stage, cluster), stage.name not in on_cpu
        assert (f"#SBATCH --{option}\n" in text) == needs_gpu, stage.name
        assert f"--partition={'gpu' if needs_gpu else 'cpu'}\n" in text
        by_mpi = engine == "tensorrt_llm" and stage.name in {*engine_stages, "evaluate_served"}
        assert ("export TENSORRT_LLM_LAUNCHER='mpirun -n 1" in text) == by_mpi, stage.name
        assert ("--mpi=none" in text) == by_mpi
        if stage.name in ("plan", "prune", "report"):
            assert ("torch.distributed.run" in text) == (stage.name == "prune")
    assert "-m recipes.core.worker recipes.stages.plan" in slurm.job_script(plan.stages[0], cluster)
    plan, cluster = prepare(*DOCKER)
    for name, gpu_options in (("report", []), ("prune", ["--gpus=all"])):
        assert docker.command(stage_named(plan, name), cluster)[1] == gpu_options


def test_the_backend_of_an_existing_engine_decides_whether_speed_is_measured_on_a_gpu(
    prepare: Prepare, plan: MakePlan, complete: Complete, tmp_path: Path
) -> None:
    complete(plan("engine=openvino"))
    engine = (tmp_path / "run" / "build_teacher_engine").rename(tmp_path / "other")
    roles = ("teacher_engine", "student_engine")
    inputs = [f"stages.measure_speed.inputs.{role}={engine}" for role in roles]
    for backend, on_gpu in (("openvino", False), ("tensorrt_llm", True)):
        manifest = json.loads((engine / "manifest.json").read_text())
        manifest["config"]["backend"] = backend
        (engine / "manifest.json").write_text(json.dumps(manifest))
        overrides = (ENGINE_IMAGE, "engine=openvino", *inputs, "~stages.build_teacher_engine")
        planned, _ = prepare(*SLURM, *overrides)
        assert stage_named(planned, "measure_speed").needs_gpu == on_gpu


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


@pytest.mark.parametrize(("hardware", "connections"), [("h100", "1"), ("b200", "32")])
def test_split_layouts_limit_the_connections_of_cuda(
    prepare: Prepare, hardware: str, connections: str
) -> None:
    """GPUs before Blackwell need one connection, so that kernels start in order."""
    plan, cluster = prepare("cluster=docker", f"hardware={hardware}")
    stage = stage_named(plan, "distill")
    for tensor, context, expected in ((1, 1, None), (2, 1, connections), (1, 2, connections)):
        layout = {"tensor_model_parallel_size": tensor, "context_parallel_size": context}
        split = replace(stage, config=replace(stage.config, **layout))  # type: ignore[arg-type]
        for env in (local.environment(split, cluster), container.environment(cluster, split)):
            assert env.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected
        with_env = replace(cluster, env={"CUDA_DEVICE_MAX_CONNECTIONS": "8"})
        assert local.environment(split, with_env)["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


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


@pytest.mark.parametrize(
    ("override", "texts"),
    [
        ("cluster.time=4h", ["invalid cluster.time=4h:", "HH:MM:SS"]),
        ("cluster.time=43200", ["invalid cluster.time=43200:", "in quotes"]),
        ("cluster.time=00:04:00", ["distill stops 300 s before", "margin_seconds"]),
        ("stages.prune.resources.time=soon", ["invalid stages.prune.resources.time=soon:"]),
        ("cluster.gpus=all", ["cluster.gpus=all", "gpus-per-node, gres"]),
        ("cluster.max_requeues=-1", ["cluster.max_requeues=-1", "must be 0 or more"]),
        ("cluster.margin_seconds=0", ["cluster.margin_seconds=0", "must be 1 or more"]),
        ("cluster.cpus_per_task=0", ["cluster.cpus_per_task=0"]),
        ("cluster.margin_seconds=x", ["cluster.margin_seconds", "'x'"]),
        ("cluster.partition='a b'", ["invalid cluster.partition=a b:", "a name without spaces"]),
        ('cluster.sbatch=["mem=0"]', ["invalid cluster.sbatch[0]=mem=0:", "--mem=0"]),
        ("stages.prune.resources.sbatch=[x]", ["stages.prune.resources.sbatch[0]=x"]),
        ("cluster.python='my python'", ["cluster.python=my python"]),
        ("+cluster.images.distil=x", ["cluster.images.distil is for no stage", "'distill'"]),
        ("+cluster.mpi.build=mpirun", ["cluster.mpi.build is for no stage"]),
        ("cluster.mounts=[/no/such/folder]", ["/no/such/folder does not exist"]),
        ("cluster.mounts=[here]", ["not an absolute path"]),
        ("+cluster.partitoin=x", ["cluster.partitoin", "Did you mean 'partition'?"]),
        ("stages.report.resources.nodes=0", ["resources.nodes=0:", "must be 1 or more"]),
        ("cluster.executor=slum", ["cluster.executor=slum is not known. Did you mean 'slurm'?"]),
    ],
)
def test_invalid_settings_are_refused(prepare: Prepare, override: str, texts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        prepare(*SLURM, override)
    for part in texts:
        assert part in str(caught.value)


def test_paths_with_spaces_are_refused(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my work").mkdir()
    monkeypatch.chdir(tmp_path / "my work")
    with pytest.raises(RecipeError, match="my work cannot be mounted"):
        prepare(*SLURM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "/my env/bin/python")
    with pytest.raises(RecipeError, match="/my env/bin/python has a character"):
        prepare(*SLURM)
    prepare(*SLURM, "cluster.python=python3.11")
    prepare(*SLURM, 'cluster.images.default="registry#nemo:1"')


def test_a_cluster_that_only_sbatch_would_use_is_refused(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_CLUSTERS", "east")
    with pytest.raises(RecipeError, match="SBATCH_CLUSTERS=east"):
        prepare(*SLURM)
    monkeypatch.setenv("SLURM_CLUSTERS", "east")
    prepare(*SLURM)


def test_docker_command_has_exactly_these_options(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getgroups", lambda: [os.getgid(), 4300])
    planned, cluster = prepare(
        *DOCKER,
        'cluster.options=["--network=host"]',
        f"cluster.mounts=[{tmp_path}/cache:ro,/usr/share:ro]",
        "stages.distill.resources.devices=4",
        "stages.distill.global_batch_size=16",
        "+stages.distill.resources.env.NCCL_DEBUG=INFO",
        "+cluster.env.OMP_NUM_THREADS='8'",
        "+cluster.images.distill=special:1",
    )
    assert {"HF_HUB_OFFLINE", "TRUST_CHECKPOINTS"} <= set(cluster.pass_env)
    stage = stage_named(planned, "distill")
    arguments = [arg for group in docker.command(stage, cluster) for arg in group]
    cache = f"{tmp_path}/cache"
    options = {path: "" for path in (cache, f"{tmp_path}/home", f"{tmp_path}/run")}
    options["/usr/share"] = ":ro"
    assert arguments == [
        *("docker", "run", "--rm", f"--name={docker.container_name(stage)}", "--gpus=all"),
        *("--init", "--ipc=host", "--ulimit=memlock=-1", "--ulimit=stack=67108864"),
        *(f"--user={os.getuid()}:{os.getgid()}", "--group-add=4300", f"--workdir={tmp_path}/home"),
        *(f"--volume={path}:{path}{options[path]}" for path in sorted(options)),
        *("--env=OMP_NUM_THREADS=8", "--env=TOKENIZERS_PARALLELISM=false", "--env=NCCL_DEBUG=INFO"),
        *(f"--env=PYTHONPATH={stage.code_dir}", "--env=PYTHONSAFEPATH=1"),
        *(f"--env=HOME={cache}", "--env=USER=nemo-recipes"),
        f"--env=TORCHINDUCTOR_CACHE_DIR={cache}/torchinductor",
        *(f"--env={n}=/tmp/{n.lower()}" for n in ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")),
        f"--env=NEMO_RECIPES_CACHE={cache}",
        *(f"--env={name}" for name in cluster.pass_env),
        *("--network=host", "special:1"),
        *("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"),
        *("-m", "recipes.core.worker", "recipes.stages.distill"),
        f"{tmp_path}/run/distill/config.yaml",
    ]
    assert ["nemo-recipes:0.1.0"] in docker.command(stage_named(planned, "prune"), cluster)


def test_docker_script_starts_the_command(prepare: Prepare, tmp_path: Path) -> None:
    """Runs the real script with a fake docker that only records its arguments."""
    planned, cluster = prepare(*DOCKER, "+cluster.env.AWKWARD='it is \"$HOME\"'")
    stage = stage_named(planned, "prune")
    write_program(tmp_path / "bin" / "docker", f'printf "%s\\n" "$@" >>{tmp_path}/arguments')
    docker.write_scripts(planned, cluster)
    subprocess.run([stage.directory / local.SCRIPT], check=True, cwd="/")
    arguments = [arg for group in docker.command(stage, cluster) for arg in group]
    removal = ["rm", "--force", docker.container_name(stage)]
    assert (tmp_path / "arguments").read_text().splitlines() == [*removal, *arguments[1:]]


def test_docker_refuses_what_it_cannot_run(prepare: Prepare) -> None:
    for override, message in (
        ("stages.prune.resources.nodes=2", "resources.nodes|one rank"),
        ("cluster.images.default=null", "no image is set for stage"),
        ("cluster.options=[host]", "an option of docker run"),
    ):
        with pytest.raises(RecipeError, match=message):
            prepare(*DOCKER, override)


def test_inputs_and_models_are_mounted_once_and_read_only(
    prepare: Prepare, plan: MakePlan, complete: Complete, tmp_path: Path, hf_folder: Path
) -> None:
    model = (f"model.hf_path={hf_folder}", *SMALL_STUDENT)
    complete(plan(*model))
    shared = (tmp_path / "run" / "import_hf").rename(tmp_path / "shared")
    planned, cluster = prepare(
        *(*DOCKER, *model, "only=[import_hf,prepare_data,score,prune]"),
        f"stages.prune.inputs.checkpoint={shared}",
        f"cluster.mounts=[{tmp_path}/run]",
    )
    mounts = container.mounts_of(stage_named(planned, "import_hf"), cluster)
    is_read_only = {str(mount.path): mount.read_only for mount in mounts}
    assert is_read_only[str(hf_folder)] is True
    assert is_read_only[str(cache_dir())] is False
    inputs = [str(mount) for mount in container.mounts_of(stage_named(planned, "prune"), cluster)]
    assert f"{shared}:{shared}:ro" in inputs
    assert sum(str(tmp_path / "run") in mount for mount in inputs) == 1


def test_tokenized_text_with_a_licence_is_mounted(prepare: Prepare, tmp_path: Path) -> None:
    prefix = write_token_files(tmp_path / "corpus")
    planned, cluster = prepare(
        *(*DOCKER, "data.sources=[]", "data.heldout_sources=[]", "skip_rules=[tokens]"),
        f"data.prefix='{prefix}#licence=CC-BY-4.0'",
    )
    for stage in ("prepare_data", "distill"):
        mounts = list(map(str, container.mounts_of(stage_named(planned, stage), cluster)))
        assert f"{prefix}.bin:{prefix}.bin:ro" in mounts


def test_downloads_go_to_the_hub_folder_of_the_site(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site := tmp_path / "site").mkdir()
    monkeypatch.setenv("HF_HOME", str(site))
    planned, cluster = prepare(*DOCKER)
    imported = stage_named(planned, "import_hf")
    assert f"{site}:{site}" in map(str, container.mounts_of(imported, cluster))
    planned, cluster = prepare(*SLURM, 'cluster.images.default="registry#nemo:1"')
    script = slurm.job_script(stage_named(planned, "import_hf"), cluster)
    assert f"export HF_HOME={site}\n" in script
    [names] = re.findall("^names=.*", script, re.M)
    assert "HF_HOME" in names
    assert "HF_HUB_CACHE" not in script
