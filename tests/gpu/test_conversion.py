"""Tests on the GPU that an imported model has the logits of the original model.

TensorFloat-32 (TF32) changes the logits, so the import must turn it off.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from nemo_convert.nemo import find_checkpoint
from nemo_convert.parity import LOGITS_TOLERANCE
from recipes.core.manifest import ARTIFACT
from tests.gpu.small import Small, on_gpu, output_of, record

LOGIT_DIFFERENCE = """
import sys, torch
from pathlib import Path
from nemo_convert.parity import compare
from recipes.core.processes import prepare_imports
folder, checkpoint, *keep_tf32 = sys.argv[1:]
torch.backends.cuda.matmul.allow_tf32 = True  # as TransformerEngine sets it
if not keep_tf32:
    prepare_imports()
parity = compare(Path(folder), Path(checkpoint))
print(parity.max_logit_difference / parity.logits_std)
"""
"""Code that prints the largest logit difference of a model in NeMo or transformers from its plain
PyTorch reference, divided by the logits' standard deviation.

With a third argument, whatever its value, TF32 stays on. The code runs in a separate process,
because cuBLAS reads the setting of TF32 only once.
"""


def test_an_imported_model_has_the_logits_of_transformers(small: Small, results: Path) -> None:
    run_dir = small.folder / "import"
    shutil.rmtree(run_dir, ignore_errors=True)
    small.run(run_dir, "only=[import_hf]")
    paths = str(small.model), str(find_checkpoint(run_dir / "import_hf" / ARTIFACT))
    exact = float(output_of(LOGIT_DIFFERENCE, *paths))
    with_tf32 = float(output_of(LOGIT_DIFFERENCE, *paths, "keep_tf32"))
    record(results, "conversion", difference=exact, with_tf32=with_tf32, limit=LOGITS_TOLERANCE)
    assert exact < LOGITS_TOLERANCE
    if on_gpu():  # a CPU has no TF32
        assert with_tf32 > exact
