"""Settings of engines, and the rules that they break."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from recipes.engines.backends import engine_problems
from recipes.engines.settings import BuildEngineConfig
from recipes.planning.chain import Chain


def config(**settings: Any) -> BuildEngineConfig:
    """Returns the config of an engine; by default a bfloat16 TensorRT engine."""
    defaults: dict[str, Any] = {"backend": "tensorrt_llm", "precision": "bf16"}
    return BuildEngineConfig(stage="build_engine", **(defaults | settings))


def rules(cfg: BuildEngineConfig, chain: Chain) -> list[str]:
    """Returns the names of the rules that a config breaks if stages run on this machine."""
    return [p.rule.name for p in engine_problems(cfg, replace(chain, runs_here=True))]
