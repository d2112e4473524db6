"""What docker and Slurm are started with, and what is refused before they are."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launch.executors import container, docker, executor_of, local, slurm
from launch.executors.container import Containers, mounts_of
from launch.executors.slurm import MIN_MARGIN_SECONDS, SlurmConfig
from launch.executors.slurm_queue import SlurmJob, job_states, read_jobs
from recipes.core.constraints import violations
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT
from recipes.core.stage import Resources
from recipes.core.wheels import cache_dir
from recipes.planning.limits import slurm_seconds
from recipes.planning.training_cost import stopping_seconds
from tests.unit.conftest import planned_words

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from launch.plan import Plan
    from launch.planned import PlannedStage

GOLDEN = Path(__file__).with_name("golden")
RECIPE = "recipe=llama_width_prune"
SLURM = ("cluster=slurm", "hardware=h100")
DOCKER = ("cluster=docker", "hardware=h100")
TWO_NODES = (
    "cluster=slurm",
    'cluster.images.default="registry#nemo:1"',
    "cluster.partition=batch",
    "cluster.account=research",
    "cluster.qos=long",
    'cluster.sbatch=["--reservation=night"]',
    "hardware=h100",
    "cluster.cpus_per_task=32",
    "+cluster.env.NCCL_SOCKET_IFNAME=ib0",
    "+cluster.env.WORDS='it is $HOME'",
    "stages.distill.resources.nodes=2",
    "stages.distill.resources.devices=8",
    "stages.distill.resources.time=1-12:00:00",
    'stages.distill.resources.sbatch=["--comment=night"]',
    "stages.distill.global_batch_size=64",
)
SHORT = ("~stages.plan", "~stages.report.inputs.plan", "tasks=null", "engine=null")
Compose = Callable[..., "DictConfig"]
MakePlan = Callable[..., "Plan"]


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory and a cache of their own, as scripts hold both."""
    for folder in ("home", "cache"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("NEMO_RECIPES_CACHE", str(tmp_path / "cache"))
    # Where there is a docker, it is asked for the images; here it has them all.
    put_docker(tmp_path, "exit 0", monkeypatch)


def put_docker(tmp_path: Path, commands: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A docker that does only this, in front of any other."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{commands}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.fixture
def prepared(compose: Compose, plan: MakePlan) -> Callable[..., tuple[Plan, SlurmConfig]]:
    """Plans a run, its settings checked by the executor."""

    def prepare(*overrides: str) -> tuple[Plan, SlurmConfig]:
        executor, cluster = executor_of(compose(*planned_words(RECIPE, overrides)).cluster)
        made = executor.prepare(plan(*overrides), cluster)
        for stage in made.stages:
            stage.directory.mkdir(parents=True, exist_ok=True)
        return made, cluster  # type: ignore[return-value]

    return prepare


Prepared = Callable[..., tuple["Plan", SlurmConfig]]


def stage_of(plan: Plan, name: str) -> PlannedStage:
    return next(stage for stage in plan.stages if stage.name == name)


def require_recorded(text: str, name: str, tmp_path: Path) -> None:
    """Compares a script with the recorded one, paths and hashes aside."""
    for path, word in ((tmp_path, "TMP"), (REPO_ROOT, "REPO")):
        text = text.replace(str(path), f"/{word}")
    text = re.sub(r"\b[0-9a-f]{64}\b", "FINGERPRINT", text)
    text = re.sub(r"(--job-name=[\w.]+\.)[0-9a-f]{8}", r"\1HASH", text)
    # Mounts are in the order of their real paths, which are not the same everywhere.
    for mounts in re.findall(r"--container-mounts=(\S+)", text):
        text = text.replace(mounts, ",".join(sorted(mounts.split(","))))
    record = GOLDEN / name
    if not record.exists():
        record.write_text(text)
    assert text == record.read_text(), f"if this change is meant: rm {record}, and run this again"


def test_job_script_is_the_recorded_one(prepared: Prepared, tmp_path: Path) -> None:
    plan, cluster = prepared(*TWO_NODES)
    text = slurm.job_script(stage_of(plan, "distill"), cluster)
    require_recorded(text, "distill.sbatch", tmp_path)


def test_job_script_without_a_container_is_the_recorded_one(
    prepared: Prepared, tmp_path: Path
) -> None:
    plan, cluster = prepared("cluster=slurm", "cluster.gpus=null", "cluster.python=python3.11")
    text = slurm.job_script(stage_of(plan, "prune"), cluster)
    require_recorded(text, "prune.sbatch", tmp_path)
    assert "container" not in text


def test_submit_script_is_the_recorded_one(prepared: Prepared, tmp_path: Path) -> None:
    """The cached teacher and the pruned student do not wait for each other."""
    plan, _ = prepared(*SLURM, "teacher=cached", *SHORT)
    text = slurm.submit_script(plan)
    require_recorded(text, "submit.sh", tmp_path)
    [cache] = [line for line in text.splitlines() if "submit cache_logits" in line]
    [prune] = [line for line in text.splitlines() if "submit prune" in line]
    assert "job_prune" not in cache
    assert "job_cache_teacher" not in prune


def test_a_stage_without_torch_is_started_without_it(prepared: Prepared) -> None:
    plan, cluster = prepared(*SLURM, "cluster.images.default=null")
    scripts = {
        name: slurm.job_script(stage_of(plan, name), cluster)
        for name in ("plan", "prune", "report")
    }
    started = {n: "torch.distributed.run" in script for n, script in scripts.items()}
    assert started == {"plan": False, "prune": True, "report": False}
    assert "-m recipes.core.worker recipes.stages.plan" in scripts["plan"]


def test_only_stages_that_use_gpus_get_them(prepared: Prepared) -> None:
    """Engines of TensorRT-LLM are built and timed on one, with MPI; OpenVINO's are not."""
    for engine, on_gpu in (("openvino", False), ("tensorrt_llm", True)):
        site = (*SLURM, "cluster.partition=gpu", "cluster.cpu_partition=cpu")
        plan, cluster = prepared(*site, f"engine={engine}")
        scripts = {s.name: slurm.job_script(s, cluster) for s in plan.stages}
        without = {"plan", "prepare_data", "report"}
        engines = {"build_engine", "build_teacher_engine", "measure_speed"}
        for name, text in scripts.items():
            wanted = name not in without and (on_gpu or name not in engines)
            assert ("--gpus-per-node" in text) == wanted, name
            assert f"--partition={'gpu' if wanted else 'cpu'}\n" in text
            assert ("--mpi=pmix" in text) == (on_gpu and name in engines), name
    made, docker_cluster = prepared(*DOCKER)
    for name, words in (("report", []), ("prune", ["--gpus=all"])):
        assert docker.command(stage_of(made, name), docker_cluster)[1] == words  # type: ignore[arg-type]


def test_engines_of_other_runs_say_what_they_need(
    prepared: Prepared, plan: MakePlan, complete: Callable[..., None], tmp_path: Path
) -> None:
    complete(plan("engine=openvino"))
    other = (tmp_path / "run" / "build_teacher_engine").rename(tmp_path / "other")
    inputs = f"stages.measure_speed.inputs.teacher_engine={other}"
    settings = ("engine=openvino", inputs, "~stages.build_teacher_engine")
    for backend, on_gpu in (("openvino", False), ("tensorrt_llm", True)):
        manifest = json.loads((other / "manifest.json").read_text())
        manifest["config"]["backend"] = backend
        (other / "manifest.json").write_text(json.dumps(manifest))
        made, _ = prepared(*SLURM, *settings)
        assert stage_of(made, "measure_speed").needs_gpu == on_gpu


def test_whole_nodes_are_taken_by_stages_of_several_ranks(prepared: Prepared) -> None:
    for exclusive, whole in (("null", False), ("true", True)):
        plan, cluster = prepared(*SLURM, f"cluster.exclusive={exclusive}")
        text = slurm.job_script(stage_of(plan, "distill"), cluster)
        assert ("#SBATCH --exclusive\n#SBATCH --mem=0\n" in text) == whole
        assert any(note.rule.name == "cpus-per-task" for note in plan.notes) != whole


def test_training_stops_early_enough_for_what_it_has_to_do(prepared: Prepared) -> None:
    """From the planner, unless that is little, or the user says how long."""
    for margin, flops in (("null", 9.89e14), ("null", 1e10), ("30", 1e10)):
        plan, cluster = prepared(
            *("cluster=slurm", f"cluster.margin_seconds={margin}", "cluster.time=9-00:00:00"),
            *("hardware=h100", f"hardware.flops_per_second={flops}"),
            "stages.distill.limit_val_batches=3",
        )
        job = stage_of(plan, "distill").workload
        assert job is not None
        assert job.validation_batches == 3
        planned = math.ceil(stopping_seconds(job, plan.chain.hardware))
        assert (planned > MIN_MARGIN_SECONDS) == (flops < 1e14)
        expected = {"distill": max(MIN_MARGIN_SECONDS, planned), "prune": MIN_MARGIN_SECONDS}
        for name, seconds in expected.items():
            text = slurm.job_script(stage_of(plan, name), cluster)
            wanted = seconds if margin == "null" else 30
            assert f"export STAGE_DEADLINE=$((end - {wanted}))" in text, name


@pytest.mark.parametrize(("hardware", "connections"), [("h100", "1"), ("b200", "32")])
def test_kernels_keep_their_order_where_a_layout_wants_it(
    prepared: Prepared, hardware: str, connections: str
) -> None:
    """Before Blackwell; there streams are to run beside each other."""
    plan, cluster = prepared("cluster=docker", f"hardware={hardware}")
    stage = stage_of(plan, "distill")
    workload = stage.workload
    assert workload is not None
    for tensor, context, value in ((1, 1, None), (2, 1, connections), (1, 2, connections)):
        split = replace(workload, layout=replace(workload.layout, tensor=tensor, context=context))
        chain = replace(stage.chain, workloads={"distill": split})
        for environment in (local.environment, docker_environment):
            env = environment(replace(stage, chain=chain), cluster)
            assert env.get("CUDA_DEVICE_MAX_CONNECTIONS") == value
        mine = replace(cluster, env={"CUDA_DEVICE_MAX_CONNECTIONS": "8"})
        env = local.environment(replace(stage, chain=chain), mine)
        assert env["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


def docker_environment(stage: PlannedStage, cluster: Containers) -> dict[str, str]:
    return container.environment(cluster, stage)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be someone without a name")
def test_users_without_a_name_have_one_in_a_container(prepared: Prepared) -> None:
    """What Inductor asks for, as the uid that docker is started with."""
    plan, cluster = prepared(*DOCKER)
    env = container.environment(cluster, stage_of(plan, "distill"))
    asked = ["/usr/bin/env", "python3", "-c", "import getpass; print(getpass.getuser())"]
    path = {"PATH": os.defpath}
    nameless = subprocess.run(asked, env=path, user=54321, capture_output=True, check=False)
    assert nameless.returncode == 1
    named = {**path, "USER": env["USER"]}
    assert subprocess.run(asked, env=named, user=54321, check=False).returncode == 0


def test_gpus_are_asked_for_as_the_site_wants(prepared: Prepared) -> None:
    for gpus, line in (("gres", "--gres=gpu:1"), ("gpus-per-node", "--gpus-per-node=1")):
        plan, cluster = prepared(*SLURM, f"cluster.gpus={gpus}")
        assert f"#SBATCH {line}\n" in slurm.job_script(stage_of(plan, "prune"), cluster)


def test_forced_stage_is_complete_only_with_a_new_result(
    prepared: Prepared, plan: MakePlan, complete: Callable[..., None], tmp_path: Path
) -> None:
    """The script's own test, run by a real shell."""
    complete(plan(*SLURM))
    made, cluster = prepared(*SLURM, "force=[report]")
    stage = stage_of(made, "report")
    script = slurm.job_script(stage, cluster)
    asked = script[script.index("stage=") : script.index("if complete")] + "complete"
    manifest = stage.directory / "manifest.json"

    def is_complete() -> bool:
        return subprocess.run(["bash", "-c", asked], check=False).returncode == 0

    assert not is_complete()
    manifest.write_text(manifest.read_text().replace("2025-01-01", "2025-01-02"))
    assert is_complete()
    manifest.write_text(manifest.read_text().replace(stage.fingerprint, "other"))
    assert not is_complete()
    manifest.unlink()
    assert not is_complete()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.time=4h"], ["invalid cluster.time=4h:", "HH:MM:SS"]),
        (["cluster.time=43200"], ["invalid cluster.time=43200:", "in quotes"]),
        (["cluster.time=00:04:00"], ["distill stops 300 s before it", "margin_seconds"]),
        (["stages.prune.resources.time=soon"], ["invalid stages.prune.resources.time=soon:"]),
        (["cluster.gpus=all"], ["cluster.gpus=all", "gpus-per-node, gres"]),
        (["cluster.max_requeues=-1"], ["cluster.max_requeues=-1", "must be 0 or more"]),
        (["cluster.margin_seconds=0"], ["cluster.margin_seconds=0", "must be 1 or more"]),
        (["cluster.cpus_per_task=0"], ["cluster.cpus_per_task=0"]),
        (["cluster.margin_seconds=x"], ["cluster.margin_seconds", "'x'"]),
        (["cluster.partition='a b'"], ["invalid cluster.partition=a b:", "a name without spaces"]),
        (['cluster.sbatch=["mem=0"]'], ["invalid cluster.sbatch[0]=mem=0:", "--mem=0"]),
        (["stages.prune.resources.sbatch=[x]"], ["stages.prune.resources.sbatch[0]=x"]),
        (["cluster.python='my python'"], ["cluster.python=my python"]),
        (["+cluster.images.distil=x"], ["cluster.images.distil is for no stage", "'distill'"]),
        (["+cluster.mpi.build=pmix"], ["cluster.mpi.build is for no stage"]),
        (["cluster.mounts=[/no/such/folder]"], ["/no/such/folder does not exist"]),
        (["cluster.mounts=[here]"], ["not an absolute path"]),
        (["+cluster.partitoin=x"], ["cluster.partitoin", "Did you mean 'partition'?"]),
        (
            ["stages.report.resources.nodes=0"],
            ["invalid stages.report.resources.nodes=0:", "must be 1 or more"],
        ),
        (["cluster.executor=slum"], ["cluster.executor=slum is not known. Did you mean 'slurm'?"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_settings_get_one_message(
    prepared: Prepared, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        prepared(*SLURM, *overrides)
    for part in words:
        assert part in str(caught.value)


def test_paths_that_options_cannot_hold_are_refused(
    compose: Compose, plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my work").mkdir()
    monkeypatch.chdir(tmp_path / "my work")
    executor, cluster = executor_of(compose(RECIPE, *SLURM).cluster)
    with pytest.raises(RecipeError, match="my work cannot be mounted"):
        executor.prepare(plan(*SLURM), cluster)


def test_times_are_read_as_slurm_reads_them() -> None:
    assert slurm_seconds("04:00:00") == 4 * 3600
    assert slurm_seconds("2-01:02:03") == 2 * 86400 + 3600 + 123
    for text in ("", "4", "1:2", "00:60:00", "1-00", "-01:00:00", "04:00:00 "):
        assert list(violations(Resources(time=text)))


def test_newest_job_of_a_stage_counts(tmp_path: Path) -> None:
    (tmp_path / "jobs.txt").write_text("prune 7 a\ndistill 8 b\nprune 9 c\ndistill 1")
    assert read_jobs(tmp_path) == {
        "prune": SlurmJob("prune", "9", "c"),
        "distill": SlurmJob("distill", "8", "b"),
    }
    assert read_jobs(tmp_path / "elsewhere") == {}


def test_slurm_that_does_not_answer_is_not_an_empty_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact' >&2; exit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RecipeError, match=r"squeue does not answer: .*Unable to contact"):
        job_states([SlurmJob("prune", "7", "a")])
    squeue.write_text("#!/bin/sh\necho 'error: Invalid job id specified' >&2; exit 1\n")
    assert job_states([SlurmJob("prune", "7", "a")]) == {}


def test_docker_command_is_exact(prepared: Prepared, tmp_path: Path) -> None:
    made, cluster = prepared(
        *DOCKER,
        'cluster.options=["--network=host"]',
        f"cluster.mounts=[{tmp_path}/cache:ro,/usr/share:ro]",
        "stages.distill.resources.devices=4",
        "stages.distill.global_batch_size=16",
        "+stages.distill.resources.env.NCCL_DEBUG=INFO",
        "+cluster.env.OMP_NUM_THREADS='8'",
    )
    stage = stage_of(made, "distill")
    words = [word for group in docker.command(stage, cluster) for word in group]  # type: ignore[arg-type]
    repo, cache = str(REPO_ROOT), f"{tmp_path}/cache"
    mounts = {path: "" for path in (repo, cache, f"{tmp_path}/home", f"{tmp_path}/run")}
    mounts["/usr/share"] = ":ro"
    assert words == [
        *("docker", "run", "--rm", f"--name={docker.container_name(stage)}", "--gpus=all"),
        *("--ipc=host", "--ulimit=memlock=-1", "--ulimit=stack=67108864"),
        *(f"--user={os.getuid()}:{os.getgid()}", f"--workdir={tmp_path}/home"),
        *(f"--volume={path}:{path}{mounts[path]}" for path in sorted(mounts)),
        *(f"--env=PYTHONPATH={repo}", "--env=OMP_NUM_THREADS=8"),
        "--env=TOKENIZERS_PARALLELISM=false",
        "--env=NCCL_DEBUG=INFO",
        *(f"--env=HOME={cache}", "--env=USER=nemo-recipes"),
        *(f"--env=TORCHINDUCTOR_CACHE_DIR={cache}/torchinductor",),
        f"--env=NEMO_RECIPES_CACHE={cache}",
        *("--env=HF_TOKEN", "--env=WANDB_API_KEY", "--env=MLFLOW_TRACKING_TOKEN"),
        *("--network=host", "nemo-recipes:0.1.0"),
        *("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"),
        *("-m", "recipes.core.worker", "recipes.stages.distill"),
        f"{tmp_path}/run/distill/config.yaml",
    ]


def test_docker_script_starts_exactly_that(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real script, with a docker that only says how it was started."""
    made, cluster = prepared(*DOCKER, "+cluster.env.AWKWARD='it is \"$HOME\"'")
    stage = stage_of(made, "prune")
    put_docker(tmp_path, f'printf "%s\\n" "$@" >>{tmp_path}/said', monkeypatch)
    docker.write_scripts(made, cluster)  # type: ignore[arg-type]
    subprocess.run([stage.directory / local.SCRIPT], check=True, cwd="/")
    words = [word for group in docker.command(stage, cluster) for word in group]  # type: ignore[arg-type]
    removal = ["rm", "--force", docker.container_name(stage)]
    assert (tmp_path / "said").read_text().splitlines() == [*removal, *words[1:]]


def test_docker_refuses_what_it_cannot_run(prepared: Prepared) -> None:
    for overrides, words in (
        (["stages.prune.resources.nodes=2"], "resources.nodes|one rank"),
        (["cluster.images.default=null"], "no image is set for stage"),
        (["cluster.options=[host]"], "an option of docker run"),
    ):
        with pytest.raises(RecipeError, match=words):
            prepared(*DOCKER, *overrides)


def test_each_stage_may_have_an_image_of_its_own(prepared: Prepared) -> None:
    made, cluster = prepared(*DOCKER, "+cluster.images.prune=special:1")
    for name, image in (("prune", "special:1"), ("distill", "nemo-recipes:0.1.0")):
        assert [image] in docker.command(stage_of(made, name), cluster)  # type: ignore[arg-type]


def test_what_a_stage_reads_is_mounted_once_and_protected(
    prepared: Prepared,
    plan: MakePlan,
    complete: Callable[..., None],
    tmp_path: Path,
    hf_folder: Path,
) -> None:
    model = (
        f"model.hf_path={hf_folder}",
        "stages.prune.target_hidden_size=64",
        "stages.prune.target_ffn_hidden_size=128",
    )
    complete(plan(*model))
    shared = (tmp_path / "run" / "import_hf").rename(tmp_path / "shared")
    made, cluster = prepared(
        *DOCKER,
        *model,
        "only=[import_hf,prepare_data,score,prune]",
        f"stages.prune.inputs.checkpoint={shared}",
        f"cluster.mounts=[{tmp_path}/run]",
    )
    outside = {str(m.path): m.read_only for m in mounts_of(stage_of(made, "import_hf"), cluster)}
    assert outside[str(hf_folder)] is True
    assert outside[str(cache_dir())] is False
    inputs = [str(mount) for mount in mounts_of(stage_of(made, "prune"), cluster)]
    assert f"{shared}:{shared}:ro" in inputs
    assert sum(str(tmp_path / "run") in mount for mount in inputs) == 1


@pytest.mark.parametrize("cluster", ["local", "docker", "slurm"])
def test_scripts_of_a_dry_run_are_clean_and_without_secrets(
    launch: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, cluster: str
) -> None:
    secrets = {"HF_TOKEN": "hf_seen", "WANDB_API_KEY": "wandb_seen", "MY_TOKEN": "my_seen"}
    done = launch(
        *(RECIPE, f"cluster={cluster}", "dry_run=true", f"run_dir={tmp_path}/run"),
        "cluster.pass_env=[HF_TOKEN,WANDB_API_KEY,MY_TOKEN]",
        "+cluster.env.WORDS='it is \"$HOME\" `id`'",
        *([] if cluster == "local" else ["cluster.gpus=null"]),
        *(['cluster.images.default="registry#image:1"'] if cluster == "slurm" else []),
        **secrets,
    )
    assert done.returncode == 0, done.stderr
    assert "nothing was started" in done.stdout
    run = tmp_path / "run"
    scripts = [*run.glob("*/run.sh"), *run.glob("*/job.sbatch"), *run.glob("submit.sh")]
    stages = len([*run.glob("*/config.yaml")])
    assert len(scripts) == (stages + 1 if cluster == "slurm" else stages) > 7
    subprocess.run([Path(sys.executable).with_name("shellcheck"), *scripts], check=True)
    texts = [file.read_text() for file in run.rglob("*") if file.is_file()]
    assert not [text for text in texts for secret in secrets.values() if secret in text]
    if cluster != "local":
        assert any("MY_TOKEN" in text for text in texts)


def test_tracker_needs_a_launcher_that_waits(
    launch: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    words = (RECIPE, *SLURM, "dry_run=true", "tracker=tensorboard")
    refused = launch(*words)
    assert refused.returncode == 1
    assert "add cluster.follow=true" in refused.stderr
    assert launch(*words, "cluster.follow=true").returncode == 0


def test_quotes_survive_in_a_job(prepared: Prepared) -> None:
    made, cluster = prepared(*SLURM, "+cluster.env.WORDS='it is \"$HOME\"'")
    text = slurm.job_script(stage_of(made, "prune"), cluster)
    words = shlex.quote('it is "$HOME"')
    assert f"export WORDS={words}\n" in text
