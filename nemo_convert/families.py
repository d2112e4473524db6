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


OUTPUT_LAYER = "output_layer.weight"
"""Megatron's name of the weight that computes the logits."""
LOCAL_SPEC_NAMES = {
    r"input_layernorm\.weight$": "self_attention.linear_qkv.layer_norm_weight",
    r"pre_mlp_layernorm\.weight$": "mlp.linear_fc1.layer_norm_weight",
    # local_experts.3.linear_fc1.weight becomes linear_fc1.weight3.
    r"local_experts\.(\d+)\.(linear_fc[12]\.weight)$": r"\2\1",
}
"""Maps regular expressions for names in Megatron's local layer spec (PyTorch modules) to the
replacements of the matches in its TransformerEngine spec."""


@dataclass(frozen=True)
class Weight:
    """One Megatron weight and the Hugging Face weights that it consists of.

    ``{i}`` in a name is the layer, ``{e}`` the expert. ``shape`` returns the shape of the unsharded
    Megatron weight. ``merge`` builds this weight from the Hugging Face weights; ``split`` is the
    inverse. Both move values, but do not change them.
    """

    megatron: str
    hf: tuple[str, ...]
    shape: Callable[[Architecture], tuple[int, ...]]
    merge: Callable[[Architecture, list[torch.Tensor]], torch.Tensor]
    split: Callable[[Architecture, torch.Tensor], list[torch.Tensor]]
    hf_rows: Callable[[Architecture], tuple[int, ...]] | None = None
    """Returns the number of rows of each weight in ``hf``; ``None`` if the numbers are equal."""

    @property
    def checkpoint_key(self) -> str:
        """Returns the key of the weight in a checkpoint.

        A checkpoint stacks the weights of all layers and experts under one key. The first axes of
        the stack are [i, e, …] for experts, and [i, …] for other weights of a layer. For example,
        the key of ``decoder.layers.{i}.mlp.experts.linear_fc1.weight{e}`` is
        ``module.decoder.layers.mlp.experts.experts.linear_fc1.weight``.
        """
        key = f"module.{self.megatron}".replace(".{i}.", ".")
        return key.replace("experts.", "experts.experts.").replace("{e}", "")

    def stack_sizes(self, architecture: Architecture) -> dict[str, int]:
        """Maps ``i`` to the number of layers and ``e`` to that of experts, if the name has them."""
        sizes = {"i": architecture.num_layers, "e": architecture.num_moe_experts}
        return {axis: size for axis, size in sizes.items() if "{" + axis + "}" in self.megatron}

    def hf_names(self, indices: Mapping[str, int]) -> list[str]:
        """Returns the Hugging Face names for a layer and expert, such as ``{"i": 3, "e": 0}``."""
        return [name.format(**indices) for name in self.hf]

    def hf_shapes(self, architecture: Architecture) -> list[tuple[int, ...]]:
        """Returns the shapes of the Hugging Face weights, in the order of ``hf``."""
        megatron_rows, *columns = self.shape(architecture)
        count = len(self.hf)
        equal_rows = (megatron_rows // count,) * count
        row_counts = self.hf_rows(architecture) if self.hf_rows else equal_rows
        return [(rows, *columns) for rows in row_counts]


@dataclass(frozen=True)
class Family:
    """One model family: the models that transformers loads with the same class."""

    hf_architecture: str
    model_type: str
    """Key ``model_type`` of ``config.json``, by which transformers chooses the class."""
    importer: str
    """NeMo's importer class (module:name), which makes NeMo's config. The importer's conversion of
    weights is not used, because it would load the model twice and drop the chat template."""
    model: str
    """NeMo's model class (module:name)."""
    weights: tuple[Weight, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """transformers' defaults of keys in ``config.json``, where they differ from Llama's."""
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)
    """The only RoPE scaling that NeMo's config supports, with any ``factor``; empty if none."""
    corrections: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    """Takes a ``config.json``. Returns the correct values of the fields of NeMo's config that the
    importer sets wrongly."""

    def has(self, weights: tuple[Weight, ...]) -> bool:
        """Returns whether the family has these weights, such as ``QKV_BIAS``."""
        return set(weights) <= set(self.weights)

    def weights_of(self, architecture: Architecture) -> Iterator[tuple[Weight, dict[str, int]]]:
        """Yields (weight, indices) for every weight of a model; indices are ``{"i": 3, "e": 0}``.

        Only the weights of experts have ``e``. A weight outside the layers has no index.
        """
        for weight in self.weights:
            if weight.megatron == OUTPUT_LAYER and architecture.tied_embeddings:
                continue  # the output layer is the embedding
            stack_sizes = weight.stack_sizes(architecture)
            for layer_and_expert in product(*map(range, stack_sizes.values())):
                yield weight, dict(zip(stack_sizes, layer_and_expert, strict=True))

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
        """Maps Megatron names, such as ``decoder.layers.3.…``, to (weight, indices)."""
        return {
            weight.megatron.format(**indices): (weight, indices)
            for weight, indices in self.weights_of(architecture)
        }

    def transformer_engine_name(self, name: str) -> str:
        """Returns a parameter's name in Megatron's TransformerEngine layer spec.

        ``name`` is the name in the local spec, or already in the TransformerEngine spec.
        """
        if self.has(EXPERTS) and name.endswith("pre_mlp_layernorm.weight"):
            return name  # TransformerEngine fuses this norm into the MLP of dense models only
        for local_pattern, replacement in LOCAL_SPEC_NAMES.items():
            name = re.sub(local_pattern, replacement, name)
        return name


def _renamed_weight(
    megatron: str, hf: str, shape: Callable[[Architecture], tuple[int, ...]]
) -> Weight:
    """Describes a Megatron weight that equals one Hugging Face weight, except for the name."""
    return Weight(megatron, (hf,), shape, lambda _, tensors: tensors[0], lambda _, tensor: [tensor])


def _norm_shape(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size,)


def _embedding_shape(arch: Architecture) -> tuple[int, ...]:
    return (arch.vocab_size, arch.hidden_size)


def _qkv_rows(arch: Architecture) -> tuple[int, int, int]:
    """Returns the number of rows of q, of k and of v."""
    heads, groups = arch.num_attention_heads, arch.num_query_groups
    return heads * arch.kv_channels, groups * arch.kv_channels, groups * arch.kv_channels


def _merge_qkv(arch: Architecture, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Interleaves q, k and v by query group, as Megatron stores them: [q … q, k, v] per group."""
    import torch

    groups, dim = arch.num_query_groups, arch.kv_channels
    # [groups, heads per group, dim, ...]; the last axis is missing for a bias.
    grouped = [tensor.reshape(groups, -1, dim, *tensor.shape[1:]) for tensor in tensors]
    return torch.cat(grouped, dim=1).reshape(-1, *tensors[0].shape[1:])


def _split_qkv(arch: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Returns q, k and v of a weight or bias that ``_merge_qkv`` returned."""
    groups, dim = arch.num_query_groups, arch.kv_channels
    queries = arch.num_attention_heads // groups  # per group, which also has one key and one value
    grouped = tensor.reshape(groups, queries + 2, dim, *tensor.shape[1:])
    qkv = grouped.split([queries, 1, 1], dim=1)
    return [weight.reshape(-1, *tensor.shape[1:]).contiguous() for weight in qkv]


def _concat(_: Architecture, tensors: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat(tensors)


def _split_in_half(_: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
    return [half.contiguous() for half in tensor.chunk(2)]


# Prefixes of the names in a layer, in Megatron and in Hugging Face.
_LAYER, _HF_LAYER = "decoder.layers.{i}.", "model.layers.{i}."
_COMMON = (
    _renamed_weight(
        "embedding.word_embeddings.weight", "model.embed_tokens.weight", _embedding_shape
    ),
    _renamed_weight(
        f"{_LAYER}self_attention.linear_qkv.layer_norm_weight",
        f"{_HF_LAYER}input_layernorm.weight",
        _norm_shape,
    ),
    Weight(
        f"{_LAYER}self_attention.linear_qkv.weight",
        tuple(f"{_HF_LAYER}self_attn.{p}_proj.weight" for p in "qkv"),
        lambda a: (sum(_qkv_rows(a)), a.hidden_size),
        _merge_qkv,
        _split_qkv,
        _qkv_rows,
    ),
    _renamed_weight(
        f"{_LAYER}self_attention.linear_proj.weight",
        f"{_HF_LAYER}self_attn.o_proj.weight",
        lambda a: (a.hidden_size, a.num_attention_heads * a.kv_channels),
    ),
    _renamed_weight("decoder.final_layernorm.weight", "model.norm.weight", _norm_shape),
    _renamed_weight(OUTPUT_LAYER, "lm_head.weight", _embedding_shape),
)
QKV_BIAS = (
    Weight(
        f"{_LAYER}self_attention.linear_qkv.bias",
        tuple(f"{_HF_LAYER}self_attn.{p}_proj.bias" for p in "qkv"),
        lambda a: (sum(_qkv_rows(a)),),
        _merge_qkv,
        _split_qkv,
        _qkv_rows,
    ),
)
QK_NORM = tuple(
    _renamed_weight(
        f"{_LAYER}self_attention.{p}_layernorm.weight",
        f"{_HF_LAYER}self_attn.{p}_norm.weight",
        lambda a: (a.kv_channels,),
    )
    for p in "qk"
)
_FEED_FORWARD = (
    _renamed_weight(
        f"{_LAYER}mlp.linear_fc1.layer_norm_weight",
        f"{_HF_LAYER}post_attention_layernorm.weight",
        _norm_shape,
    ),
    Weight(
        f"{_LAYER}mlp.linear_fc1.weight",
        (f"{_HF_LAYER}mlp.gate_proj.weight", f"{_HF_LAYER}mlp.up_proj.weight"),
        lambda a: (2 * a.ffn_hidden_size, a.hidden_size),
        _concat,
        _split_in_half,
    ),
    _renamed_weight(
        f"{_LAYER}mlp.linear_fc2.weight",
        f"{_HF_LAYER}mlp.down_proj.weight",
        lambda a: (a.hidden_size, a.ffn_hidden_size),
    ),
)
EXPERTS = (
    _renamed_weight(
        f"{_LAYER}pre_mlp_layernorm.weight",
        f"{_HF_LAYER}post_attention_layernorm.weight",
        _norm_shape,
    ),
    _renamed_weight(
        f"{_LAYER}mlp.router.weight",
        f"{_HF_LAYER}mlp.gate.weight",
        lambda a: (a.num_moe_experts, a.hidden_size),
    ),
    Weight(
        f"{_LAYER}mlp.experts.linear_fc1.weight{{e}}",
        tuple(f"{_HF_LAYER}mlp.experts.{{e}}.{p}_proj.weight" for p in ("gate", "up")),
        lambda a: (2 * a.moe_ffn_hidden_size, a.hidden_size),
        _concat,
        _split_in_half,
    ),
    _renamed_weight(
        f"{_LAYER}mlp.experts.linear_fc2.weight{{e}}",
        f"{_HF_LAYER}mlp.experts.{{e}}.down_proj.weight",
        lambda a: (a.hidden_size, a.moe_ffn_hidden_size),
    ),
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""RoPE scaling of NeMo's Llama 3.1 config. NeMo's importer reads only ``factor`` from a model's
``config.json``. A model must therefore have these values of the other keys."""
_NEMO_MODELS = "nemo.collections.llm.gpt.model"
_QWEN_DEFAULTS = {
    "max_position_embeddings": 32_768,
    "max_window_layers": 28,
    "sliding_window": 4096,
    "use_sliding_window": False,
}


def _without_sliding_window(_: Mapping[str, Any]) -> dict[str, Any]:
    """Turns off the sliding window of NeMo's Mistral config.

    ``cp_comm_type`` is the communication of context parallelism that NeMo chooses for the window.
    ``read_architecture`` refuses models whose sequences can be longer than their window.
    """
    return {"window_size": None, "cp_comm_type": None}


def _router_softmax_order(config: Mapping[str, Any]) -> dict[str, Any]:
    """Chooses whether Megatron's router applies the softmax before or after top-k.

    Hugging Face applies the softmax to all experts, then selects the top k. If ``norm_topk_prob``
    is true, it normalizes the k probabilities again, which equals a softmax after top-k.
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
            corrections=_without_sliding_window,
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
            corrections=_router_softmax_order,
        ),
    )
}
"""Maps each supported class in transformers to its family."""
