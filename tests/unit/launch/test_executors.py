"""GPUs, MPI and variables of containers and Slurm jobs, and settings that are refused."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.executors import container, docker, local, slurm
from recipes.core.errors import RecipeError
from tests.unit.conftest import Complete, MakePlan, stage_named
from tests.unit.launch.conftest import ENGINE_IMAGE, GENERATIVE_TASK, SLURM, Prepare


@pytest.mark.parametrize(
    ("engine", "cluster_gpus", "gpu_option"),
    [("openvino", "gres", "gres=gpu:1"), ("tensorrt_llm", "gpus-per-node", "gpus-per-node=1")],
)
def test_jobs_get_gpus_mpi_and_torchrun_only_if_their_stage_needs_them(
    prepare: Prepare, engine: str, cluster_gpus: str, gpu_option: str
) -> None:
    """Engines of TensorRT-LLM are built and timed on a GPU, with MPI; OpenVINO's are not."""
    partitions = ("cluster.partition=gpu", "cluster.cpu_partition=cpu")
    plan, cluster = prepare(
        *(*SLURM, *partitions, f"cluster.gpus={cluster_gpus}"),
        *(f"engine={engine}", ENGINE_IMAGE, "served=engine", GENERATIVE_TASK),
    )
    engine_stages = {"build_engine", "build_teacher_engine", "measure_speed"}
    on_cpu = {"plan", "prepare_data", "report", *(engine_stages if engine == "openvino" else ())}
    for stage in plan.stages:
        script = slurm.job_script(stage, cluster)
        needs_gpu = stage.name not in on_cpu
        assert (f"#SBATCH --{gpu_option}\n" in script) == needs_gpu, stage.name
        assert f"--partition={'gpu' if needs_gpu else 'cpu'}\n" in script
        uses_mpi = engine == "tensorrt_llm" and stage.name in {*engine_stages, "evaluate_served"}
        assert ("export TENSORRT_LLM_LAUNCHER='mpirun -n 1" in script) == uses_mpi, stage.name
        # The stage starts mpirun itself, so srun must not offer its own MPI (PMIx).
        assert ("--mpi=none" in script) == uses_mpi
        if stage.name in ("plan", "prune", "report"):
            assert ("torch.distributed.run" in script) == (stage.name == "prune")
    assert "-m recipes.core.worker recipes.stages.plan" in slurm.job_script(plan.stages[0], cluster)


def test_variables_of_the_user_replace_those_of_a_job(prepare: Prepare) -> None:
    env = ("+cluster.env.TENSORRT_LLM_LAUNCHER=mine", "+cluster.env.TMPDIR=/scratch")
    plan, cluster = prepare(*SLURM, "engine=tensorrt_llm", ENGINE_IMAGE, GENERATIVE_TASK, *env)
    script = slurm.job_script(stage_named(plan, "build_engine"), cluster)
    assert "export TENSORRT_LLM_LAUNCHER=mine\n" in script
    assert "export TMPDIR=/scratch\n" in script
    assert "TMPDIR=/tmp" not in script
    assert "USER=nemo-recipes" in script


def test_containers_get_gpus_only_if_stage_and_hardware_use_them(prepare: Prepare) -> None:
    for hardware, name, needs_gpu in (
        ("h100", "prune", True),
        ("h100", "report", False),
        ("cpu", "prune", False),
    ):
        plan, cluster = prepare("cluster=docker", f"hardware={hardware}")
        options = {line[0] for line in docker.command(stage_named(plan, name), cluster)}
        gpu_options = {option for option in options if option.startswith("--gpus")}
        assert gpu_options == ({"--gpus=all"} if needs_gpu else set()), (hardware, name)


def test_the_backend_of_an_existing_engine_decides_whether_speed_is_measured_on_a_gpu(
    prepare: Prepare, plan: MakePlan, complete: Complete, tmp_path: Path
) -> None:
    """The engine is outside of the run directory. Its manifest says which backend it is for."""
    complete(plan("engine=openvino"))
    engine_dir = (tmp_path / "run" / "build_teacher_engine").rename(tmp_path / "other")
    input_names = ("teacher_engine", "student_engine")
    inputs = [f"stages.measure_speed.inputs.{name}={engine_dir}" for name in input_names]
    manifest_file = engine_dir / "manifest.json"
    for backend, on_gpu in (("openvino", False), ("tensorrt_llm", True)):
        manifest = json.loads(manifest_file.read_text())
        manifest["config"]["backend"] = backend
        manifest_file.write_text(json.dumps(manifest))
        overrides = (ENGINE_IMAGE, "engine=openvino", *inputs, "~stages.build_teacher_engine")
        planned, _ = prepare(*SLURM, *overrides)
        assert stage_named(planned, "measure_speed").needs_gpu == on_gpu


@pytest.mark.parametrize(("hardware", "connections"), [("h100", "1"), ("b200", "32")])
def test_tensor_and_context_parallelism_set_cuda_device_max_connections(
    prepare: Prepare, hardware: str, connections: str
) -> None:
    """GPUs before Blackwell need one connection to start kernels in the order of their calls.

    ``cluster.env`` replaces the value.
    """
    plan, cluster = prepare("cluster=docker", f"hardware={hardware}")
    stage = stage_named(plan, "distill")
    for tp_size, cp_size, expected in ((1, 1, None), (2, 1, connections), (1, 2, connections)):
        layout = {"tensor_model_parallel_size": tp_size, "context_parallel_size": cp_size}
        config = replace(stage.config, **layout)  # type: ignore[arg-type]
        parallel = replace(stage, config=config)
        for env in (local.environment(parallel, cluster), container.environment(cluster, parallel)):
            assert env.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected
        with_env = replace(cluster, env={"CUDA_DEVICE_MAX_CONNECTIONS": "8"})
        assert local.environment(parallel, with_env)["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


@pytest.mark.parametrize(
    ("override", "texts"),
    [
        ("cluster.time=4h", ["invalid cluster.time=4h:", "HH:MM:SS"]),
        # YAML 1.1 reads 12:00:00 without quotes as 43200 seconds.
        ("cluster.time=43200", ["invalid cluster.time=43200:", "in quotes"]),
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
        ("+cluster.env.MASTER_ADDR=x", ["invalid cluster.env.MASTER_ADDR=MASTER_ADDR: must be"]),
        ("cluster.executor=slum", ["cluster.executor=slum is not known. Did you mean 'slurm'?"]),
    ],
)
def test_invalid_settings_are_refused(prepare: Prepare, override: str, texts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        prepare(*SLURM, override)
    for text in texts:
        assert text in str(caught.value)


def test_a_stage_that_stops_before_the_limit_needs_a_limit_above_its_margin(
    prepare: Prepare,
) -> None:
    """One requeue is too few for 100,000 steps, but the message does not suggest more jobs.

    Every job would stop at once.
    """
    limits = ("cluster.time=00:04:00", "cluster.max_requeues=1")
    message = r"(?s)cluster.time=00:04:00 is too short: distill stops 300 s before.*margin_seconds"
    with pytest.raises(RecipeError, match=message):
        prepare(*SLURM, *limits, "stages.distill.max_steps=100000")
    with pytest.raises(RecipeError, match="00:05:00 is too short: distill stops 300 s before"):
        prepare(*SLURM, "stages.distill.resources.time=00:05:00")
    prepare(*SLURM, "stages.report.resources.time=00:05:00")


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
    # Accepted, because the jobs then do not use the launcher's interpreter.
    prepare(*SLURM, "cluster.python=python3.11")
    prepare(*SLURM, 'cluster.images.default="registry#nemo:1"')


def test_downloads_of_jobs_go_to_the_hub_folder_of_the_site(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site := tmp_path / "site").mkdir()
    monkeypatch.setenv("HF_HOME", str(site))
    planned, cluster = prepare(*SLURM, 'cluster.images.default="registry#nemo:1"')
    script = slurm.job_script(stage_named(planned, "import_hf"), cluster)
    assert f"export HF_HOME={site}\n" in script
    # The script's variable ``names`` lists what srun passes with --container-env.
    [names_line] = re.findall("^names=.*", script, re.M)
    assert "HF_HOME" in names_line
    assert "HF_HUB_CACHE" not in script
