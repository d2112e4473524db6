"""Repeats the numerical tests with each older instruction set that this processor has.

The kernels for two instruction sets may sum in different orders and multiply different types. By
default, libraries use the newest set, and so do all other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from recipes.core.files import REPO_ROOT

NUMERICAL = (
    "backend/test_adamw.py",
    "backend/test_cpu_speed.py",
    "backend/test_training_layers.py",
    "distillation/test_layouts.py::test_every_layout_has_the_losses_of_one_rank[PP=2]",
    "distillation/test_logit_cache.py::test_cached_probabilities_equal_those_of_transformers",
    "distillation/test_losses.py",
    "distillation/test_objective.py",
    "evaluation/test_text_quality.py::test_quality_is_measured_by_source",
    "nemo_convert/test_parity.py::test_the_checkpoint_passes",
    "pruning/test_healing.py",
    "pruning/test_minitron.py::test_loss_scores_equal_the_loss_of_a_model_without_the_layers",
    "pruning/test_minitron.py::test_pruning_gives_the_logits_of_modelopts_own_pruning",
    "search/test_search.py::test_candidates_have_the_metrics_of_pruned_models",
)
"""Files and tests below ``tests/cpu`` whose results depend on the order of sums."""
INSTRUCTION_SETS = {
    "AVX2": ("avx2", "AVX2", "AVX2"),
    "AVX512": ("avx512", "AVX512_CORE", "AVX512"),  # without bfloat16 and AMX
    "AVX512 with bfloat16": ("avx512", "AVX512_CORE_BF16", "AVX512"),  # without AMX
}
"""Maps a set to its names in PyTorch, oneDNN and MKL, in the order of ``VARIABLES``."""
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables that limit PyTorch, oneDNN and MKL to an instruction set."""
REQUIRED_CAPABILITIES = {"AVX2": "avx2", "AVX512": "avx512_f", "AVX512 with bfloat16": "amx_bf16"}
"""Maps a set to the processor capability, as PyTorch names it, that the test requires.

AVX512 with bfloat16 requires AMX, which is newer. A processor without AMX has at best this set as
its newest, so all other tests use it already.
"""


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_numerical_tests_pass_with_instruction_set(name: str) -> None:
    if not torch.cpu.get_capabilities()[REQUIRED_CAPABILITIES[name]]:
        pytest.skip(f"this processor does not have {REQUIRED_CAPABILITIES[name]}")
    limits = dict(zip(VARIABLES, INSTRUCTION_SETS[name], strict=True))
    tests = [f"tests/cpu/{test}" for test in NUMERICAL]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    completed = subprocess.run(
        command,
        env={**os.environ, **limits},
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stdout[-5000:]
