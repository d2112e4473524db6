"""Prunes teachers that transformers 5 saved. Versions 4 and 5 must give the same outputs.

``test_chain`` does the same for Llama.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

from nemo_convert.architecture import Architecture
from nemo_convert.hf_config import SUPPORTED
from recipes.core.manifest import ARTIFACT
from recipes.pruning.targets import transformers_5_problems
from tests.support.generation import require_same_outputs
from tests.support.in_process import run_successfully
from tests.support.models import ODD, write_tiny_model
from tests.support.runs import DISTILL, manifest_of, settings, tiny
from tests.support.transformers_5 import (
    run_with_transformers_5,
    save_by_transformers_5,
    transformers_5,
)
from tests.unit.planning.models import SMOLLM2

TARGETS = {
    "qwen3": {"target_ffn_hidden_size": 72},
    "qwen3_moe": {
        "target_ffn_hidden_size": "null",  # the model has no dense feed-forward layers
        "target_moe_ffn_hidden_size": 32,
        "target_num_moe_experts": 4,
    },
}
"""Feed-forward targets of each teacher, by ``model_type``."""


def test_students_give_the_same_outputs_in_transformers_4_and_5(
    tmp_path: Path, text_file: Path
) -> None:
    """The models have tied embeddings, and RMSNorm on queries and keys."""
    shape = {**ODD, "eos_token_id": 0}  # the id of the tokenizer's "<eos>"
    models = [write_tiny_model(tmp_path / name, text_file, name, **shape) for name in TARGETS]
    students = []
    for teacher, targets in zip(save_by_transformers_5(*models), TARGETS.values(), strict=True):
        run_dir = tmp_path / f"{teacher.name}-run"
        run_successfully(
            "recipe=llama_width_prune",
            *("tasks=null", "engine=null"),
            *tiny(teacher, text_file, run_dir),
            *settings("score", num_calibration_samples=8),
            *settings("prune", target_hidden_size=40, hidden_size_divisor=8, **targets),
            *settings("prune", ffn_hidden_size_divisor=8, target_num_attention_heads=5),
            *settings("distill", **DISTILL),
            *settings("evaluate", num_sequences=4, new_tokens=4),
            cwd=tmp_path,
        )
        student = Architecture(**manifest_of(run_dir, "export_hf").architecture or {})
        assert (student.hidden_size, student.num_attention_heads) == (40, 5)
        assert student.tied_embeddings
        assert student.qk_layernorm
        students.append(run_dir / "export_hf" / ARTIFACT)
    require_same_outputs(transformers_5(), *students)


CONFIG_SCRIPT = """
import sys, transformers
for argument in sys.argv[1:]:
    family, hidden, heads, refused = argument.split()
    sizes = dict(hidden_size=int(hidden), num_attention_heads=int(heads), head_dim=64)
    try:
        getattr(transformers, family)(**sizes, num_key_value_heads=int(heads))
        assert refused == "False", argument
    except Exception as error:  # huggingface_hub raises it; its cause is transformers' own error
        assert "not a multiple of the number of attention heads" in str(error.__cause__), argument
        assert refused == "True", argument
"""
"""Requires that transformers 5 refuses exactly the configs that the plan warns of. Each argument
has a config class, its hidden size, its number of heads, and whether the plan warns."""


def test_the_plan_warns_of_students_that_transformers_5_refuses() -> None:
    arguments = []
    # 9 heads do not divide a hidden size of 512. The other sizes are multiples of their heads.
    sizes_to_check = [(576, 9), (512, 9), (512, 8), (384, 6)]
    for family, (hidden, heads) in product(SUPPORTED, sizes_to_check):
        sizes = {"hidden_size": hidden, "num_attention_heads": heads}
        shape = replace(SMOLLM2, hf_architecture=family, **sizes)
        refused = bool(list(transformers_5_problems("prune", shape)))
        config_class = family.replace("ForCausalLM", "Config")
        arguments.append(f"{config_class} {hidden} {heads} {refused}")
    assert "LlamaConfig 512 9 True" in arguments
    run_with_transformers_5(CONFIG_SCRIPT, *arguments)
