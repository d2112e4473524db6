"""Maps the weights and configs of each model family between Hugging Face and NeMo."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from nemo_convert.architecture import Architecture

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Weight:
    """One Megatron weight and the Hugging Face weights that it consists of.

    ``{i}`` in a name is the layer, ``{e}`` the expert. ``shape`` is the shape without parallelism.
    ``merge`` builds the Megatron weight from the Hugging Face weights; ``split`` is the inverse.
    They only move values, and change none.
    """

    megatron: str
    hf: tuple[str, ...]
    shape: Callable[[Architecture], tuple[int, ...]]
    merge: Callable[[Architecture, list[torch.Tensor]], torch.Tensor]
    split: Callable[[Architecture, torch.Tensor], list[torch.Tensor]]
    hf_rows: Callable[[Architecture], tuple[int, ...]] | None = None
    """Function that returns the number of rows of each Hugging Face weight. The field is ``None``
    if all have the same number."""

    @property
    def checkpoint_key(self) -> str:
        """Returns the key of the weight in a checkpoint, without the prefix ``module.``.

        A checkpoint stacks the weights of all layers and experts. The stack's first axes are the
        letters of the name: [i, e, …], [i, …] or none. The key of experts has experts.experts.
        """
        key = self.megatron.replace(".{i}.", ".")
        return key.replace("experts.", "experts.experts.").replace("{e}", "")

    def stack_sizes(self, architecture: Architecture) -> dict[str, int]:
        """Maps ``i`` to the number of layers and ``e`` to that of experts, if the name has them."""
        letters = {"i": architecture.num_layers, "e": architecture.num_moe_experts}
        return {x: count for x, count in letters.items() if f"{{{x}}}" in self.megatron}

    def hf_names(self, indices: Mapping[str, int]) -> list[str]:
        """Returns the Hugging Face names for a layer and expert, such as ``{"i": 3, "e": 0}``."""
        return [name.format(**indices) for name in self.hf]

    def hf_shapes(self, architecture: Architecture) -> list[tuple[int, ...]]:
        """Returns the shapes of the Hugging Face weights, in the order of ``hf``."""
        rows, *columns = self.shape(architecture)
        parts = len(self.hf)
        sizes = self.hf_rows(architecture) if self.hf_rows else (rows // parts,) * parts
        return [(size, *columns) for size in sizes]


@dataclass(frozen=True)
class Family:
    """One model family."""

    hf_architecture: str
    model_type: str
    """Key ``model_type`` of ``config.json``, by which transformers chooses the class."""
    importer: str
    """NeMo's importer class (module:name). Only its NeMo config is used: NeMo's own conversion of
    weights would load the model twice and drop the chat template."""
    model: str
    """NeMo's model class (module:name)."""
    weights: tuple[Weight, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Transformers' defaults of absent config.json fields, where they differ from Llama's."""
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)
    """The only RoPE scaling that NeMo's config supports, with any ``factor``; empty if none."""
    corrections: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    """Returns, for a ``config.json``, the right values of fields that the importer sets wrongly."""

    def has(self, weights: tuple[Weight, ...]) -> bool:
        """Returns whether the family has these weights, such as ``QKV_BIAS``."""
        return set(weights) <= set(self.weights)

    def weights_of(self, architecture: Architecture) -> Iterator[tuple[Weight, dict[str, int]]]:
        """Yields (weight, layer and expert indices) for every weight of a model of this shape."""
        for weight in self.weights:
            if weight.megatron == OUTPUT_LAYER and architecture.tied_embeddings:
                continue
            stack_sizes = weight.stack_sizes(architecture)
            for indices in product(*map(range, stack_sizes.values())):
                yield weight, dict(zip(stack_sizes, indices, strict=True))

    def hf_shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Maps the name of each Hugging Face weight of a model to the weight's shape."""
        return {
            name: shape
            for weight, indices in self.weights_of(architecture)
            for name, shape in zip(
                weight.hf_names(indices), weight.hf_shapes(architecture), strict=True
            )
        }

    def by_megatron_name(
        self, architecture: Architecture
    ) -> dict[str, tuple[Weight, dict[str, int]]]:
        """Maps the Megatron name of each weight to what ``weights_of`` yields for the weight."""
        weights = self.weights_of(architecture)
        return {w.megatron.format(**indices): (w, indices) for w, indices in weights}

    def transformer_engine_name(self, name: str) -> str:
        """Translates a parameter's name in any layer spec to that in TransformerEngine's spec."""
        if self.has(EXPERTS) and name.endswith("pre_mlp_layernorm.weight"):
            return name  # TransformerEngine fuses this norm into the MLP of dense models only
        for local, canonical in LOCAL_SPEC_NAMES.items():
            name = re.sub(local, canonical, name)
        return name


OUTPUT_LAYER = "output_layer.weight"
LOCAL_SPEC_NAMES = {
    r"input_layernorm\.weight$": "self_attention.linear_qkv.layer_norm_weight",
    r"pre_mlp_layernorm\.weight$": "mlp.linear_fc1.layer_norm_weight",
    r"local_experts\.(\d+)\.(linear_fc[12]\.weight)$": r"\2\1",
}
"""Maps names in Megatron's local layer spec (regular expressions) to TransformerEngine's spec."""


def _renamed(name: str, hf: str, shape: Callable[[Architecture], tuple[int, ...]]) -> Weight:
    """Describes a Megatron weight that equals one Hugging Face weight, except for the name."""
    return Weight(name, (hf,), shape, lambda _, tensors: tensors[0], lambda _, tensor: [tensor])


def _norm_shape(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size,)


def _embedding_shape(arch: Architecture) -> tuple[int, ...]:
    return (arch.vocab_size, arch.hidden_size)


def _fused_qkv_rows(arch: Architecture) -> int:
    return (arch.num_attention_heads + 2 * arch.num_query_groups) * arch.kv_channels


def _separate_qkv_rows(arch: Architecture) -> tuple[int, ...]:
    keys = arch.num_query_groups * arch.kv_channels
    return arch.num_attention_heads * arch.kv_channels, keys, keys


def _merge_qkv(arch: Architecture, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Interleaves q, k and v by query group, as Megatron stores them: [q … q, k, v] per group."""
    import torch

    groups, dim = arch.num_query_groups, arch.kv_channels
    parts = [t.reshape(groups, -1, dim, *t.shape[1:]) for t in tensors]
    return torch.cat(parts, dim=1).reshape(-1, *tensors[0].shape[1:])


def _split_qkv(arch: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
    groups, dim = arch.num_query_groups, arch.kv_channels
    per_group = arch.num_attention_heads // groups
    grouped = tensor.reshape(groups, per_group + 2, dim, *tensor.shape[1:])
    parts = grouped.split([per_group, 1, 1], dim=1)
    return [part.reshape(-1, *tensor.shape[1:]).contiguous() for part in parts]


def _concat(_: Architecture, tensors: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat(tensors)


def _split_in_half(_: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
    return [half.contiguous() for half in tensor.chunk(2)]


# Prefixes of the names in a layer, in Megatron and in Hugging Face.
_LAYER, _HF = "decoder.layers.{i}.", "model.layers.{i}."
_COMMON = (
    _renamed("embedding.word_embeddings.weight", "model.embed_tokens.weight", _embedding_shape),
    _renamed(
        f"{_LAYER}self_attention.linear_qkv.layer_norm_weight",
        f"{_HF}input_layernorm.weight",
        _norm_shape,
    ),
    Weight(
        f"{_LAYER}self_attention.linear_qkv.weight",
        tuple(f"{_HF}self_attn.{p}_proj.weight" for p in "qkv"),
        lambda a: (_fused_qkv_rows(a), a.hidden_size),
        _merge_qkv,
        _split_qkv,
        _separate_qkv_rows,
    ),
    _renamed(
        f"{_LAYER}self_attention.linear_proj.weight",
        f"{_HF}self_attn.o_proj.weight",
        lambda a: (a.hidden_size, a.num_attention_heads * a.kv_channels),
    ),
    _renamed("decoder.final_layernorm.weight", "model.norm.weight", _norm_shape),
    _renamed(OUTPUT_LAYER, "lm_head.weight", _embedding_shape),
)
QKV_BIAS = (
    Weight(
        f"{_LAYER}self_attention.linear_qkv.bias",
        tuple(f"{_HF}self_attn.{p}_proj.bias" for p in "qkv"),
        lambda a: (_fused_qkv_rows(a),),
        _merge_qkv,
        _split_qkv,
        _separate_qkv_rows,
    ),
)
QK_NORM = tuple(
    _renamed(
        f"{_LAYER}self_attention.{p}_layernorm.weight",
        f"{_HF}self_attn.{p}_norm.weight",
        lambda a: (a.kv_channels,),
    )
    for p in "qk"
)
_FEED_FORWARD = (
    _renamed(
        f"{_LAYER}mlp.linear_fc1.layer_norm_weight",
        f"{_HF}post_attention_layernorm.weight",
        _norm_shape,
    ),
    Weight(
        f"{_LAYER}mlp.linear_fc1.weight",
        (f"{_HF}mlp.gate_proj.weight", f"{_HF}mlp.up_proj.weight"),
        lambda a: (2 * a.ffn_hidden_size, a.hidden_size),
        _concat,
        _split_in_half,
    ),
    _renamed(
        f"{_LAYER}mlp.linear_fc2.weight",
        f"{_HF}mlp.down_proj.weight",
        lambda a: (a.hidden_size, a.ffn_hidden_size),
    ),
)
EXPERTS = (
    _renamed(
        f"{_LAYER}pre_mlp_layernorm.weight", f"{_HF}post_attention_layernorm.weight", _norm_shape
    ),
    _renamed(
        f"{_LAYER}mlp.router.weight",
        f"{_HF}mlp.gate.weight",
        lambda a: (a.num_moe_experts, a.hidden_size),
    ),
    Weight(
        f"{_LAYER}mlp.experts.linear_fc1.weight{{e}}",
        tuple(f"{_HF}mlp.experts.{{e}}.{p}_proj.weight" for p in ("gate", "up")),
        lambda a: (2 * a.moe_ffn_hidden_size, a.hidden_size),
        _concat,
        _split_in_half,
    ),
    _renamed(
        f"{_LAYER}mlp.experts.linear_fc2.weight{{e}}",
        f"{_HF}mlp.experts.{{e}}.down_proj.weight",
        lambda a: (a.hidden_size, a.moe_ffn_hidden_size),
    ),
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""RoPE scaling of NeMo's Llama 3.1 config. NeMo's importer takes only the factor from the model."""
_NEMO_MODELS = "nemo.collections.llm.gpt.model"
_QWEN_DEFAULTS = {
    "max_position_embeddings": 32_768,
    "max_window_layers": 28,
    "sliding_window": 4096,
    "use_sliding_window": False,
}


def _no_window(_: Mapping[str, Any]) -> dict[str, Any]:
    """Removes the sliding window of NeMo's Mistral config, and the context parallelism for windows.

    A model that needs a window has been refused before.
    """
    return {"window_size": None, "cp_comm_type": None}


def _router_order(config: Mapping[str, Any]) -> dict[str, Any]:
    """Chooses whether Megatron's softmax comes before or after top-k.

    Hugging Face takes the softmax over all experts, then top-k. ``norm_topk_prob`` normalises the
    top k again, which equals a softmax after top-k.
    """
    return {"moe_router_pre_softmax": not config.get("norm_topk_prob", False)}


FAMILIES = {
    family.hf_architecture: family
    for family in (
        Family(
            "LlamaForCausalLM",
            "llama",
            f"{_NEMO_MODELS}.llama:HFLlamaImporter",
            f"{_NEMO_MODELS}.llama:LlamaModel",
            _COMMON + _FEED_FORWARD,
            rope_scaling=LLAMA3_ROPE,
        ),
        Family(
            "MistralForCausalLM",
            "mistral",
            f"{_NEMO_MODELS}.mistral:HFMistralImporter",
            f"{_NEMO_MODELS}.mistral:MistralModel",
            _COMMON + _FEED_FORWARD,
            defaults={
                "max_position_embeddings": 131_072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
            corrections=_no_window,
        ),
        Family(
            "Qwen2ForCausalLM",
            "qwen2",
            f"{_NEMO_MODELS}.qwen2:HFQwen2Importer",
            f"{_NEMO_MODELS}.qwen2:Qwen2Model",
            _COMMON + QKV_BIAS + _FEED_FORWARD,
            defaults={**_QWEN_DEFAULTS, "num_key_value_heads": 32},
        ),
        Family(
            "Qwen3ForCausalLM",
            "qwen3",
            f"{_NEMO_MODELS}.qwen3:HFQwen3Importer",
            f"{_NEMO_MODELS}.qwen3:Qwen3Model",
            _COMMON + QK_NORM + _FEED_FORWARD,
            defaults={**_QWEN_DEFAULTS, "num_key_value_heads": 32, "head_dim": 128},
        ),
        Family(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            f"{_NEMO_MODELS}.qwen3:HFQwen3Importer",
            f"{_NEMO_MODELS}.qwen3:Qwen3Model",
            _COMMON + QK_NORM + EXPERTS,
            defaults={**_QWEN_DEFAULTS, "num_key_value_heads": 4},
            corrections=_router_order,
        ),
    )
}
