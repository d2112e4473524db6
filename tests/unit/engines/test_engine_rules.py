"""Tests which settings of engines, and which shapes, the plan refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemo_convert.architecture import Architecture
from recipes.engines.backends import engine_problems
from recipes.engines.settings import QuantizeConfig
from recipes.planning.chain import Chain
from recipes.stages import quantize
from tests.unit.engines.configs import config, rules


@pytest.fixture
def chain(teacher: Architecture) -> Chain:
    """A chain with a model that has 1024 positions, and a head size with a kernel."""
    return Chain("teacher", replace(teacher, kv_channels=64), {})


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"precision": "fp32"}, "format"),
        ({"backend": "openvino", "precision": "fp8"}, "format"),
        ({"precision": "int8_sq"}, "format"),
        ({"precision": "int4_awq"}, "format"),
        ({"kv_cache_dtype": "u8"}, "format"),
        ({"kv_cache_dtype": "int8"}, "format"),
        ({"kv_cache_dtype": "fp8"}, "kv-cache"),
        ({"kv_cache_dtype": "fp8", "precision": "int4"}, "kv-cache"),
        ({"max_seq_len": 2048}, "max-seq-len"),
        ({"max_seq_len": 512, "max_input_len": 512}, "max-input-len"),
        (
            {"backend": "openvino", "precision": "fp32", "tensor_parallel_size": 2},
            "tensor-parallel",
        ),
    ],
)
def test_invalid_settings_break_a_rule(settings: dict[str, Any], rule: str, chain: Chain) -> None:
    assert rules(config(**settings), chain) == [rule]


def test_a_backend_that_supports_the_precision_is_suggested(chain: Chain) -> None:
    [awq] = engine_problems(config(precision="int4_awq"), replace(chain, runs_here=True))
    assert "or backend=tensorrt_llm_pytorch" in awq.fix


def test_fp8_kv_cache_needs_scales_or_the_pytorch_backend(chain: Chain) -> None:
    for settings in (
        {"backend": "tensorrt_llm_pytorch", "kv_cache_dtype": "fp8"},
        {"precision": "fp8", "kv_cache_dtype": "fp8"},  # an FP8 checkpoint has the scales
    ):
        assert rules(config(**settings), chain) == []
    # With ``auto``, the quantize stage calibrates no scales of the KV cache.
    cfg = config(precision="fp8", kv_cache_dtype="fp8", inputs={"checkpoint": "quantize"})
    for calibrated_dtype, broken in (("fp8", []), ("auto", ["kv-cache"])):
        source = QuantizeConfig(
            stage="quantize", kv_cache_dtype=calibrated_dtype, inputs={"checkpoint": "import_hf"}
        )
        assert rules(cfg, replace(chain, stages={"quantize": source})) == broken
        # An engine with ``auto`` takes the KV cache that the checkpoint declares.
        automatic = replace(cfg, kv_cache_dtype="auto")
        opposite = [] if broken else ["kv-cache"]
        assert rules(automatic, replace(chain, stages={"quantize": source})) == opposite


def test_experts_are_checked_by_their_own_width_and_need_the_pytorch_backend(
    chain: Chain,
) -> None:
    """The feed-forward size of a dense layer has no weights in a mixture of experts."""
    moe = replace(
        chain.teacher, num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=256,
        ffn_hidden_size=6001,
    )  # fmt: skip
    assert rules(config(), Chain("teacher", moe, {})) == ["engine-model"]
    awq = config(backend="tensorrt_llm_pytorch", precision="int4_awq")
    assert rules(awq, Chain("teacher", moe, {})) == []
    narrow = replace(moe, moe_ffn_hidden_size=200)  # no multiple of 128
    assert rules(awq, Chain("teacher", narrow, {})) == ["alignment"]
    cfg = QuantizeConfig(stage="quantize", format="int4_awq", inputs={})
    for arch, broken in ((moe, []), (narrow, ["alignment"])):
        problems = quantize.check(cfg, Chain("teacher", arch, {}))
        assert [problem.rule.name for problem in problems] == broken
