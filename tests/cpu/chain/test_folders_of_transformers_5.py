"""Prunes teachers that transformers 5 saved. Students must be equal in transformers 4 and 5.

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
        "target_ffn_hidden_size": "null",
        "target_moe_ffn_hidden_size": 32,
        "target_num_moe_experts": 4,
    },
}


def test_students_are_the_same_in_transformers_5(tmp_path: Path, text_file: Path) -> None:
    """The models have tied embeddings, and normalized queries and keys."""
    shape = {**ODD, "eos_token_id": 0}
    models = [write_tiny_model(tmp_path / name, text_file, name, **shape) for name in TARGETS]
    students = []
    for teacher, targets in zip(save_by_transformers_5(*models), TARGETS.values(), strict=True):
        run_dir = tmp_path / f"{teacher.name}-run"
        run_successfully(
            "recipe=llama_width_prune",
            "tasks=null",
            "engine=null",
            *tiny(teacher, text_file, run_dir),
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


REQUIRE_CONFIGS = """
import sys, transformers
for argument in sys.argv[1:]:
    family, hidden, heads, refused = argument.split()
    sizes = dict(hidden_size=int(hidden), num_attention_heads=int(heads), head_dim=64)
    try:
        getattr(transformers, family)(**sizes, num_key_value_heads=int(heads))
        assert refused == "False", argument
    except Exception as error:  # of huggingface_hub, which transformers 4 does not have
        assert "not a multiple of the number of attention heads" in str(error.__cause__), argument
        assert refused == "True", argument
"""


def test_the_plan_warns_of_students_that_transformers_5_refuses() -> None:
    shapes = []
    for family, (hidden, heads) in product(SUPPORTED, [(576, 9), (512, 9), (512, 8), (384, 6)]):
        sizes = {"hidden_size": hidden, "num_attention_heads": heads}
        shape = replace(SMOLLM2, hf_architecture=family, **sizes)
        refused = bool(list(transformers_5_problems("prune", shape)))
        shapes.append(f"{family.replace('ForCausalLM', 'Config')} {hidden} {heads} {refused}")
    assert "LlamaConfig 512 9 True" in shapes
    run_with_transformers_5(REQUIRE_CONFIGS, *shapes)
