"""Shapes, profiles and workloads that tests of plans share."""

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
    """Returns a profile of ``conf/hardware``."""
    schema.register()
    cfg = OmegaConf.merge(
        OmegaConf.structured(Hardware), OmegaConf.load(CONF / "hardware" / f"{name}.yaml")
    )
    hardware: Hardware = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    return hardware


def published(model: str) -> Architecture:
    """Returns the bundled shape of a model."""
    return read_architecture(CONFIGS[model], model)


H100, CPU = profile("h100"), profile("cpu")
LLAMA, QWEN = published("meta-llama/Llama-3.1-8B"), published("Qwen/Qwen3-8B")
SMOLLM2 = read_architecture(HF_CONFIG, "smollm2")
NODES_96 = Layout(nodes=96, devices=8, tensor=8, micro_batch_size=2, sequence_parallel=True)


def distillation(student: Architecture, teacher: Architecture | None, **settings: Any) -> Workload:
    """Returns a distillation run; by default as large as NVIDIA's: 768 H100 GPUs, 90 B tokens."""
    defaults = {"layout": NODES_96, "seq_length": 4096, "global_batch_size": 768, "steps": 28_610}
    return Workload(student, teacher, **(defaults | settings))


def with_experts(arch: Architecture, **changes: Any) -> Architecture:
    """Returns an MoE with eight experts, two of them active for each token."""
    experts = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 128}
    return replace(arch, **(experts | changes))
