"""A model is imported on the GPU, whose TensorFloat-32 would make another one of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from nemo_convert.nemo import find_checkpoint
from nemo_convert.parity import LOGITS_TOLERANCE
from recipes.core.files import REPO_ROOT
from recipes.core.manifest import ARTIFACT
from tests.gpu.small import Small, on_gpu, record


def difference(*arguments: str) -> float:
    """What ``logit_difference`` finds, in a process of its own: cuBLAS asks once for its type."""
    command = [sys.executable, str(Path(__file__).with_name("logit_difference.py")), *arguments]
    env = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.split()[-1])


def test_an_import_proves_itself(small: Small, results: Path) -> None:
    run_dir = small.folder / "import"
    shutil.rmtree(run_dir, ignore_errors=True)
    small.start(run_dir, "only=[import_hf]")
    pair = str(small.model), str(find_checkpoint(run_dir / "import_hf" / ARTIFACT))
    exact, rounded = difference(*pair), difference(*pair, "tf32")
    record(results, "conversion", difference=exact, with_tf32=rounded, tolerance=LOGITS_TOLERANCE)
    assert exact < LOGITS_TOLERANCE
    if on_gpu():
        assert rounded > exact
