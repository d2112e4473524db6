"""Layer specs, configs and patches for Megatron-Core without TransformerEngine, on CPU and CUDA.

Local layers are Megatron's layers in plain PyTorch. They are selected only in memory: checkpoints
contain the config for TransformerEngine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recipes.backend.adamw import FusedAdamW
from recipes.backend.device import device
from recipes.backend.patches import Patch, apply_to, replace_with
from recipes.core.errors import RecipeError
from recipes.core.versions import TRANSFORMER_ENGINE, installed_version

FUSIONS = (
    "apply_rope_fusion",
    "masked_softmax_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "gradient_accumulation_fusion",
    "persist_layer_norm",
    "cross_entropy_loss_fusion",
    "moe_grouped_gemm",
    "moe_permute_fusion",
)
"""Megatron's settings for fused kernels that need TransformerEngine, Apex or CUDA."""


def needs_local_layers() -> bool:
    """Returns whether models must use local layers, because CUDA or TransformerEngine is missing.

    Raises:
        RecipeError: There is a GPU, but the installed TransformerEngine cannot be imported.
    """
    from megatron.core.models.gpt import gpt_layer_specs

    if device() == "cpu":
        return True
    # HAVE_TE is true if Megatron could import TransformerEngine. If the import failed, Megatron
    # would silently use the slower local layers.
    if not gpt_layer_specs.HAVE_TE and (version := installed_version(TRANSFORMER_ENGINE)):
        raise RecipeError(
            f"TransformerEngine {version} is installed but cannot be imported.",
            'see the error of: python -c "import transformer_engine.pytorch"; repair or remove it',
        )
    return not gpt_layer_specs.HAVE_TE


def adapt_config(config: Any, training: bool = False) -> Any:
    """Changes a NeMo model config so that this machine can build the model. Returns the config.

    Local layers have the checkpoint keys of TransformerEngine's layers. With ``training``, local
    layers include the faster layers of ``training_layers``, which ModelOpt cannot prune.
    """
    if needs_local_layers():
        use_local_layers(config)
        if training:
            config.transformer_layer_spec = training_block_spec
        # Despite its name, this setting makes Megatron use any activation module of the layer spec.
        # Only the training spec has such a module.
        config.use_te_activation_func = training
        config.use_cpu_initialization = device() == "cpu"
    return config


def use_local_layers(config: Any) -> None:
    """Selects Megatron's local layers in a config.

    Importance scores for pruning need local layers on CUDA, too. ModelOpt computes the scores with
    hooks on the norms, which TransformerEngine fuses with linear layers.
    """
    config.transformer_layer_spec = local_layer_spec
    for fusion in FUSIONS:
        setattr(config, fusion, False)


def local_layer_spec(config: Any) -> Any:
    """Returns Megatron's local layer spec with PyTorch's fused attention."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from recipes.backend.training_layers import CausalAttention

    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        normalization=config.normalization,
        qk_layernorm=config.qk_layernorm,
    )
    if config.num_moe_experts:
        # The map gives norms the checkpoint keys of TransformerEngine's fused layers. This norm is
        # not fused in MoE layers, so it keeps its own key.
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    return spec


def training_block_spec(config: Any) -> Any:
    """Returns the local layer spec with the norms and the activation of ``training_layers``.

    A GPU without TransformerEngine also needs these layers: Megatron's norm refuses sequence
    parallelism, and Megatron's activation saves a tensor that memory estimates do not include.
    """
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    from recipes.backend.training_layers import RMSNorm, SwiGLU

    spec = local_layer_spec(config)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    mlp = layer.mlp.submodules
    if config.num_moe_experts:
        mlp.experts.submodules.activation_func = SwiGLU
    else:
        mlp.activation_func = SwiGLU
    layers = [spec] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def restore_fused_attention(core: nn.Module) -> None:
    """Restores ``CausalAttention`` in a Megatron model, where ModelOpt has replaced it."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from recipes.backend.training_layers import CausalAttention

    patch = Patch(
        "megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
        "it stores all heads' attention scores",
        "95b0a0dcd2e5",
        replace_with(CausalAttention.forward),
    )
    for module in core.modules():
        if isinstance(module, DotProductAttention):
            apply_to(module, patch)


def register_rms_norm() -> None:
    """Makes ModelOpt able to prune ``nn.RMSNorm``, the norm of Megatron's local layer spec."""
    from modelopt.torch.nas.modules.norm import _DynamicLayerNorm
    from modelopt.torch.nas.registry import DMRegistry

    if nn.RMSNorm in DMRegistry:
        return

    # ModelOpt's class for LayerNorm also registers a bias, which RMSNorm does not have.
    class _DynamicRMSNorm(_DynamicLayerNorm):
        def _setup(self, *, num_features: Any) -> None:
            self._register_hparam("num_features", num_features)
            self._register_dynamic_attribute("weight", self._cut_to_active_features)
            self._register_dynamic_attribute("normalized_shape", self._get_normalized_shape)

    DMRegistry.register({nn.RMSNorm: "nn.RMSNorm"})(_DynamicRMSNorm)


def _skip_fusion_checks(original: Any) -> Any:
    """Hides fusions from Megatron's check. ``adapt_config``, which disables them, runs later."""

    def __post_init__(self: Any) -> None:  # noqa: N807
        fusions = ("apply_rope_fusion", "moe_permute_fusion")
        requested = {name: getattr(self, name) for name in fusions}
        vars(self).update(dict.fromkeys(fusions, False))
        original(self)
        vars(self).update(requested)

    return __post_init__


def _router_logits(x: Any, weight: Any, bias: Any, dtype: torch.dtype) -> torch.Tensor:
    """Computes the logits of an MoE router in ``dtype``. ``bias`` may be ``None``."""
    bias = None if bias is None else bias.to(dtype)
    return nn.functional.linear(x.to(dtype), weight.to(dtype), bias)


WITHOUT_TRANSFORMER_ENGINE = (
    Patch(
        "megatron.core.transformer.transformer_config:TransformerConfig.__post_init__",
        "refuses fusions without TransformerEngine",
        "8f5c4f5aeee3",
        _skip_fusion_checks,
    ),
    Patch(
        "megatron.core.transformer.moe.router:router_gating_linear",
        "reads a name that only TransformerEngine defines",
        "2592286669f7",
        replace_with(_router_logits),
    ),
    Patch(
        "megatron.core.optimizer:Adam",
        "PyTorch's AdamW has a step count per parameter, which Megatron cannot reshard",
        "2ae5744ac85c",
        replace_with(FusedAdamW),
    ),
    # With these flags, Megatron treats FusedAdamW like TransformerEngine's optimizer.
    *(
        Patch(
            target,
            "FusedAdamW has the same state as TransformerEngine's optimizer",
            "bool",  # the fingerprint of a flag is its type
            replace_with(flag),
        )
        for target, flag in (
            ("megatron.core.optimizer:USING_PYTORCH_OPTIMIZER", False),
            ("megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE", True),
            ("megatron.core.optimizer.distrib_optimizer:USING_APEX_OPTIMIZER", True),
        )
    ),
)
