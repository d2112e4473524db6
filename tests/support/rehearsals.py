"""Makes jobs for rehearsals, which run stages on fake tensors. Few layers save time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from launch.machine import chain_of
from launch.planned import stage_of
from launch.schema import compose
from launch.stages import stage_order, typed_stages, with_shapes
from recipes.planning.chain import CONFIGS, Chain, read_config_or_published
from recipes.rehearsal.job import RankJob, jobs_of

MOE_MODEL = "Qwen/Qwen3-30B-A3B"
"""An MoE model that no recipe uses. The config that is added to ``CONFIGS`` has a quarter of the
model's experts: 32 instead of 128."""
CONFIGS[MOE_MODEL] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
}


@cache
def job_with_layers(
    recipe: str, stage: str, rank: int = 0, overrides: tuple[str, ...] = (), layers: int = 4
) -> tuple[Chain, RankJob]:
    """Returns a recipe's chain, and the job that rehearses one rank of a stage.

    The teacher gets ``layers`` layers. If the recipe prunes layers, half of them are pruned.
    """
    cfg = compose(f"recipe={recipe}", *overrides)
    prune = OmegaConf.select(cfg, "stages.prune") or {}
    if prune.get("target_num_layers") is not None:
        prune.target_num_layers = layers // 2
    if prune.get("drop_layers") is not None:
        prune.drop_layers = list(range(1, layers // 2 + 1))  # layer numbers start at 1
    configs = typed_stages(cfg)
    chain = chain_of(cfg, cfg.model.hf_path, configs, Path("runs"))
    chain = replace(chain, teacher=replace(chain.teacher, num_layers=layers))
    chain = with_shapes(chain, stage_order(configs))  # the students' shapes follow the teacher's
    stages = {name: stage_of(config) for name, config in configs.items()}
    hf_config, _ = read_config_or_published(chain.hf_path)
    hf_config = {**hf_config, "num_hidden_layers": layers}
    [job] = jobs_of(chain, stages, [stage], hf_config, [rank])
    return chain, job
