"""Shapes of models, hardware profiles and workloads that several tests of planning use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from launch import schema
from launch.schema import CONF
from nemo_convert.architecture import Architecture
from nemo_convert.hf_config import read_architecture
from nemo_convert.smollm2 import HF_CONFIG
from recipes.planning.chain import CONFIGS
from recipes.planning.hardware import Hardware
from recipes.planning.workload import Layout, Workload


def profile(name: str) -> Hardware:
    """Returns the hardware profile in ``conf/hardware/<name>.yaml``."""
    schema.register()
    cfg = OmegaConf.merge(
        OmegaConf.structured(Hardware), OmegaConf.load(CONF / "hardware" / f"{name}.yaml")
    )
    hardware: Hardware = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    return hardware


def published(model: str) -> Architecture:
    """Returns a model's shape from its config in ``published_configs.json``, by hub id."""
    return read_architecture(CONFIGS[model], model)


H100, CPU = profile("h100"), profile("cpu")
LLAMA, QWEN = published("meta-llama/Llama-3.1-8B"), published("Qwen/Qwen3-8B")
SMOLLM2 = read_architecture(HF_CONFIG, "smollm2")
NODES_96 = Layout(nodes=96, devices=8, tensor=8, micro_batch_size=2, sequence_parallel=True)
"""768 GPUs, on which NVIDIA distilled Qwen3 8B."""
TINY = Architecture(
    hf_architecture="",
    num_layers=1,
    hidden_size=2,
    ffn_hidden_size=3,
    num_attention_heads=1,
    num_query_groups=1,
    kv_channels=2,
    vocab_size=5,
    max_position_embeddings=8,
    tied_embeddings=True,
)
"""A shape for which FLOPs and bytes can be counted by hand."""


def distillation(student: Architecture, teacher: Architecture | None, **settings: Any) -> Workload:
    """Returns a distillation run; by default as large as NVIDIA's: 768 H100 GPUs, 90 B tokens.

    Args:
        student: Shape of the trained model.
        teacher: Shape of the live teacher; ``None`` for a run without one.
        settings: Fields of ``Workload`` that replace the defaults.
    """
    defaults = {"layout": NODES_96, "seq_length": 4096, "global_batch_size": 768, "steps": 28_610}
    return Workload(student, teacher, **(defaults | settings))


def with_experts(arch: Architecture, **changes: Any) -> Architecture:
    """Returns ``arch`` as an MoE with eight experts, two of them active for each token.

    ``changes`` are fields of ``Architecture``. They take precedence over these numbers.
    """
    experts = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 128}
    return replace(arch, **(experts | changes))


def hybrid_as_dense(layers: int, hidden: int, parameters: float) -> Architecture:
    """Approximates a hybrid of Mamba, attention and feed-forward blocks (Nemotron Nano v2).

    Two blocks count as one transformer layer. The feed-forward width is chosen to match the
    published number of parameters, so the FLOPs of linear layers are right. Mamba's scans are not
    counted.

    Args:
        layers: Number of transformer layers of the approximation.
        hidden: Hidden size.
        parameters: Published number of parameters.
    """
    attention_only = Architecture(
        hf_architecture="",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=0,
        num_attention_heads=40,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=131072,
        max_position_embeddings=131072,
        tied_embeddings=False,
    )
    ffn_parameters = parameters - attention_only.parameters()
    width = ffn_parameters / (3 * hidden * layers)  # gate, up, down projection
    return replace(attention_only, ffn_hidden_size=int(width))


HYBRIDS = hybrid_as_dense(24, 4352, 7.00e9), hybrid_as_dense(28, 4480, 8.89e9)
"""Student of 7 B parameters and teacher Nemotron-Nano-9B-v2, from Model-Optimizer's tutorial."""
