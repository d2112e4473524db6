"""The contenders, each started in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf

from nemo_convert.architecture import Architecture
from nemo_convert.hf import resolve
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import Manifest, read_manifest
from recipes.core.metrics import METRICS, steps_of
from recipes.core.processes import cores, die_with_parent

LAUNCHER = (sys.executable, str(REPO_ROOT / "launch" / "run.py"))
INPUTS = ("import_hf", "prepare_data", "score", "prune")
RECIPE = "llama_depth_prune"


@dataclass
class Record:
    """What a contender did in one round: when each step ended (s), its loss, and peak memory."""

    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_rss_bytes: int = 0


@dataclass(frozen=True)
class Shape:
    """Optimizer steps, sequences in each, and tokens in a sequence."""

    steps: int
    micro_batch: int
    seq_length: int


@dataclass(frozen=True)
class Contender:
    """One way to distil.

    Attributes:
        dtype: Type of its matrix products.
        reference: Contender on the same batches, whose losses it must find.
        stages: The launcher's stages, for a path of ours; a loop has none.
        overrides: What the launcher is told besides the inputs and the shape.
    """

    dtype: str
    reference: str | None = None
    stages: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    def teacher_in_loop(self) -> bool:
        """Whether a training step runs the teacher."""
        return "cache_logits" not in self.stages


COMPILED = "stages.distill.compile=true"
CONTENDERS = {
    "nemo": Contender("bfloat16", "nemo-fp32", ("distill",)),
    "nemo-cached": Contender("bfloat16", None, ("cache_logits", "distill"), ("teacher=cached",)),
    "nemo-compiled": Contender("bfloat16", "nemo-fp32", ("distill",), (COMPILED,)),
    "nemo-cached-compiled": Contender(
        "bfloat16", None, ("cache_logits", "distill"), ("teacher=cached", COMPILED)
    ),
    "nemo-fp32": Contender("float32", None, ("distill",), ("stages.distill.precision='32'",)),
    "loop-fp32": Contender("float32"),
    "loop-bf16": Contender("bfloat16", "loop-fp32"),
    "chunked-bf16": Contender("bfloat16", "loop-fp32"),
    "modelopt-bf16": Contender("bfloat16", "loop-fp32"),
}


def execute(command: list[str]) -> None:
    """Runs a command with the launcher's variables for this machine, without GPUs, to its end.

    Raises:
        RecipeError: It failed; the message is its own.
    """
    env = OmegaConf.load(REPO_ROOT / "conf" / "cluster" / "local.yaml").env
    done = subprocess.run(
        command,
        cwd=REPO_ROOT,
        env={
            **os.environ,
            **{str(key): str(value) for key, value in env.items()},
            "OMP_NUM_THREADS": str(cores()),
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=die_with_parent,
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["it ended without a message"]
        errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        first = errors[0] if errors else len(lines) - 1
        raise RecipeError("\n".join(lines[first:]).removeprefix("error: "), fix="")


def launch(
    base: Path, out: Path, stages: Sequence[str], settings: Mapping[str, object], *overrides: str
) -> None:
    """Runs stages in a run directory of their own, on the model of another run.

    Args:
        base: Run whose model it is, with ``import_hf`` complete.
        out: Run directory.
        stages: What to run.
        settings: Fields below ``stages``, among them inputs that are in ``base``.
        overrides: Any others.
    """
    hf_path = manifest_of(base / "import_hf").config["hf_path"]
    execute(
        [
            *LAUNCHER,
            f"recipe={RECIPE}",
            f"run_dir={out}",
            f"model.hf_path='{hf_path}'",
            f"stages.only=[{','.join(stages)}]",
            *overrides,
            *(f"stages.{name}={value}" for name, value in settings.items()),
        ]
    )


def make_inputs() -> Path:
    """Runs the stages before distillation, unless they are complete, and returns their run."""
    execute([*LAUNCHER, f"recipe={RECIPE}", f"stages.only=[{','.join(INPUTS)}]"])
    return REPO_ROOT / "runs" / RECIPE


def model_folder(source: str | None) -> Path:
    """Folder of a Hugging Face model, downloaded if need be; by default the embedded one."""
    embedded = OmegaConf.load(REPO_ROOT / "conf" / "model" / "smollm2_135m.yaml").hf_path
    return resolve(source or embedded)


def manifest_of(stage_dir: Path) -> Manifest:
    """Manifest of a complete stage.

    Raises:
        RecipeError: The stage is not complete.
    """
    manifest = read_manifest(stage_dir)
    if manifest is None:
        raise RecipeError(
            f"{stage_dir} is not complete.", f"run {', '.join(INPUTS)} with the launcher"
        )
    return manifest


def shape_of(stage_dir: Path) -> Architecture:
    """Shape of a complete stage's model."""
    return Architecture(**(manifest_of(stage_dir).architecture or {}))


def run_contender(name: str, shape: Shape, run_dir: Path, scratch: Path) -> Record:
    """Distils the student of ``run_dir``; what it writes goes to ``scratch``, an empty directory.

    Raises:
        RecipeError: The contender failed, or lacks what it needs.
    """
    contender = CONTENDERS[name]
    if contender.stages:
        return _run_stages(contender, shape, run_dir, scratch)
    out = scratch / "record.json"
    sizes = [str(size) for size in (shape.steps, shape.micro_batch, shape.seq_length)]
    command = [sys.executable, "-m", "benchmarks.loops", name, "--shape", *sizes]
    execute([*command, "--run-dir", str(run_dir), "--out", str(out)])
    return Record(**json.loads(out.read_text()))


def _run_stages(contender: Contender, shape: Shape, run_dir: Path, scratch: Path) -> Record:
    """Runs the launcher in a run directory of its own, on the stages of ``run_dir``."""
    first = contender.stages[0]  # it is what uses the teacher
    settings = {
        "distill.inputs.student": run_dir / "prune",
        "distill.inputs.data": run_dir / "prepare_data",
        f"{first}.inputs.data": run_dir / "prepare_data",
        f"{first}.inputs.teacher": run_dir / "import_hf",
        "distill.lm_weight": 0,
        "distill.max_steps": shape.steps,
        "distill.micro_batch_size": shape.micro_batch,
        "distill.global_batch_size": shape.micro_batch,
        "distill.lr": 1e-4,
        "distill.min_lr": 1e-4,
        "distill.warmup_steps": 0,
        "distill.checkpoint_interval": shape.steps,
        "distill.val_check_interval": shape.steps,
        "distill.limit_val_batches": 1,
    }
    if not contender.teacher_in_loop():
        settings["cache_logits.num_windows"] = shape.steps * shape.micro_batch
    length = f"data.seq_length={shape.seq_length}"
    launch(run_dir, scratch, contender.stages, settings, length, *contender.overrides)
    steps = steps_of(scratch / "distill" / METRICS, "distill")
    return Record(
        [step["time"] for step in steps],
        [step["loss"] for step in steps],
        manifest_of(scratch / "distill").peak_rss_bytes,
    )
