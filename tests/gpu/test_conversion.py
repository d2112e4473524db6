"""A model is imported on the GPU. TensorFloat-32 would change its logits."""

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

LOGIT_DIFFERENCE = """
import sys, torch
from pathlib import Path
from nemo_convert.parity import compare
from recipes.core.processes import prepare_imports
folder, checkpoint, *tf32 = sys.argv[1:]
torch.backends.cuda.matmul.allow_tf32 = True  # as TransformerEngine sets it
if not tf32:
    prepare_imports()
parity = compare(Path(folder), Path(checkpoint))
print(parity.max_logit_difference / parity.logits_std)
"""
"""Prints the relative difference of logits; in its own process, since cuBLAS reads TF32 once."""


def difference(*arguments: str) -> float:
    command = [sys.executable, "-c", LOGIT_DIFFERENCE, *arguments]
    env = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.split()[-1])


def test_an_import_passes_its_gates(small: Small, results: Path) -> None:
    run_dir = small.folder / "import"
    shutil.rmtree(run_dir, ignore_errors=True)
    small.start(run_dir, "only=[import_hf]")
    pair = str(small.model), str(find_checkpoint(run_dir / "import_hf" / ARTIFACT))
    exact, rounded = difference(*pair), difference(*pair, "tf32")
    record(results, "conversion", difference=exact, with_tf32=rounded, tolerance=LOGITS_TOLERANCE)
    assert exact < LOGITS_TOLERANCE
    if on_gpu():
        assert rounded > exact
