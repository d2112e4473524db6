"""Provides three different models in the roles of teacher, pruned and distilled model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_convert import convert
from recipes.core.manifest import ARTIFACT
from recipes.evaluation.results import ROLES


@pytest.fixture(scope="session")
def models(odd_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Writes a different model for each role, and returns the inputs of ``evaluate_tasks`` by role.

    Each input also has ``hf``, the Hugging Face folder of the same model. The teacher is
    ``odd_llama``. The weights of the other models differ by random noise.
    """
    root = tmp_path_factory.mktemp("models")
    inputs = {}
    for seed, role in enumerate(ROLES):
        folder = root / role
        model = AutoModelForCausalLM.from_pretrained(odd_llama, dtype=torch.float32)
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.05 * seed * torch.randn_like(weight)  # no noise for seed 0
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(odd_llama).save_pretrained(folder)
        artifact = root / f"{role}_stage" / ARTIFACT
        artifact.mkdir(parents=True)
        convert.to_nemo(folder, artifact / "model.nemo")
        inputs[role] = SimpleNamespace(artifact=artifact, hf=folder)
    return inputs
