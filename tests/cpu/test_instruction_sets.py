"""Numerical tests pass under every instruction set that this processor offers.

Kernels differ by instruction set, in the order of their sums and in the types that they multiply.
All other tests run with the newest set. This file runs the numerical tests with older sets too.
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
    "distillation/test_layouts.py::test_every_layout_has_the_losses_of_one_rank[TP=2]",
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
INSTRUCTION_SETS = {
    "AVX2": ("avx2", "AVX2", "AVX2"),
    "AVX512": ("avx512", "AVX512_CORE", "AVX512"),  # without bfloat16 and AMX
    "AVX512 with bfloat16": ("avx512", "AVX512_CORE_BF16", "AVX512"),  # without AMX
}
"""Names of each set in PyTorch, oneDNN and MKL."""
REQUIRED_CAPABILITIES = {"AVX2": "avx2", "AVX512": "avx512_f", "AVX512 with bfloat16": "amx_bf16"}
"""PyTorch's name of the capability that a processor must have. For the last set, this is AMX, a
newer set: without AMX, the last set is at best the newest, with which all tests run anyway."""
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_numerical_tests_pass_with(name: str) -> None:
    if not torch.cpu.get_capabilities()[REQUIRED_CAPABILITIES[name]]:
        pytest.skip(f"this processor does not have {REQUIRED_CAPABILITIES[name]}")
    environment = dict(zip(VARIABLES, INSTRUCTION_SETS[name], strict=True))
    files = [f"tests/cpu/{file}" for file in NUMERICAL]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
