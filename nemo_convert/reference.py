"""A plain PyTorch forward pass of every supported family: the reference of the parity gates.

It follows the config as ``hf_config`` reads it, and shares no code with transformers or Megatron.
So if one of these libraries interprets a key of the config differently, its logits differ from the
reference. Each weight is read when it is needed, so the model is never completely in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, silu, softmax

from nemo_convert.architecture import Architecture
from nemo_convert.hf_config import read_architecture, rms_norm_eps, rope_theta

ReadWeight = Callable[[str], Tensor]


def reference_logits(
    config: Mapping[str, Any], read: ReadWeight, tokens: Tensor, positions: Tensor
) -> Tensor:
    """Computes the logits of a decoder-only transformer, in float32.

    Args:
        config: ``config.json`` in the spelling of transformers 4 (``as_transformers_4``).
        read: Returns a weight by its Hugging Face name, in any dtype.
        tokens: Token ids [batch, sequence].
        positions: RoPE position of each token [sequence]. Attention is causal in the order of the
            tokens, whatever the positions are.

    Returns:
        Logits [batch, sequence, vocabulary].
    """
    arch, eps = read_architecture(config, "config.json"), rms_norm_eps(config)

    def weight(name: str) -> Tensor:
        return read(f"{name}.weight").float()

    cos_sin = _rotations(config, arch.kv_channels, positions)
    hidden = embedding(tokens, weight("model.embed_tokens"))
    for layer in range(arch.num_layers):
        prefix = f"model.layers.{layer}."
        normed = _rms_norm(hidden, weight(f"{prefix}input_layernorm"), eps)
        hidden = hidden + _attention(normed, arch, read, f"{prefix}self_attn.", cos_sin, eps)
        normed = _rms_norm(hidden, weight(f"{prefix}post_attention_layernorm"), eps)
        if arch.num_moe_experts:
            normalize = config.get("norm_topk_prob", False)
            hidden = hidden + _experts(normed, arch, read, f"{prefix}mlp.", normalize)
        else:
            hidden = hidden + _gated_mlp(normed, read, f"{prefix}mlp.")
    hidden = _rms_norm(hidden, weight("model.norm"), eps)
    return linear(hidden, weight("model.embed_tokens" if arch.tied_embeddings else "lm_head"))


def inverse_frequencies(config: Mapping[str, Any], dim: int) -> Tensor:
    """Returns RoPE's angle per position of each pair of channels, in radians, float64 [dim / 2].

    Llama 3.1's scaling follows ``apply_scaling`` in ``models/llama3/model.py`` of
    https://github.com/meta-llama/llama-models.

    Raises:
        ValueError: The config's ``rope_type`` is neither ``default`` nor ``llama3``.
    """
    frequencies = rope_theta(config) ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    if scaling["rope_type"] == "default":
        return frequencies
    if scaling["rope_type"] != "llama3":
        raise ValueError(f"the reference does not support the RoPE scaling {scaling}")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # Number of full turns of each pair within the original context. A pair with at least ``high``
    # turns keeps its frequency. With at most ``low`` turns, its frequency is divided by ``factor``.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    unscaled_fraction = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (unscaled_fraction + (1 - unscaled_fraction) / scaling["factor"])


def _rotations(config: Mapping[str, Any], dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines of RoPE's angles, each [sequence, dim].

    The halves of ``dim`` are equal, because channels ``i`` and ``i + dim / 2`` are a pair.
    """
    angles = torch.outer(positions.double(), inverse_frequencies(config, dim)).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)


def _attention(
    hidden: Tensor,
    arch: Architecture,
    read: ReadWeight,
    prefix: str,
    cos_sin: tuple[Tensor, Tensor],
    eps: float,
) -> Tensor:
    """Computes causal grouped-query attention [batch, sequence, hidden]."""
    batch, length, _ = hidden.shape

    def project(letter: str) -> Tensor:
        """Returns heads [batch, heads, sequence, channels] of ``q``, ``k`` or ``v``."""
        bias = read(f"{prefix}{letter}_proj.bias").float() if arch.qkv_bias else None
        heads = linear(hidden, read(f"{prefix}{letter}_proj.weight").float(), bias)
        heads = heads.view(batch, length, -1, arch.kv_channels)
        if arch.qk_layernorm and letter in "qk":
            heads = _rms_norm(heads, read(f"{prefix}{letter}_norm.weight").float(), eps)
        return heads.transpose(1, 2)

    queries, keys = (_rotate(project(letter), *cos_sin) for letter in "qk")
    heads_per_group = arch.num_attention_heads // arch.num_query_groups
    keys = keys.repeat_interleave(heads_per_group, dim=1)
    values = project("v").repeat_interleave(heads_per_group, dim=1)
    scores = queries @ keys.transpose(2, 3) / math.sqrt(arch.kv_channels)
    is_future = torch.ones(length, length, dtype=torch.bool).triu(1)  # [query, key]
    attended = softmax(scores.masked_fill(is_future, -torch.inf), dim=-1) @ values
    merged = attended.transpose(1, 2).reshape(batch, length, -1)
    return linear(merged, read(f"{prefix}o_proj.weight").float())


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE to heads [..., sequence, dim]: rotates each pair ``i`` and ``i + dim / 2``."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def _gated_mlp(hidden: Tensor, read: ReadWeight, prefix: str) -> Tensor:
    """Computes ``down(silu(gate(hidden)) * up(hidden))``."""
    gate, up, down = (read(f"{prefix}{n}_proj.weight").float() for n in ("gate", "up", "down"))
    return linear(silu(linear(hidden, gate)) * linear(hidden, up), down)


def _experts(
    hidden: Tensor, arch: Architecture, read: ReadWeight, prefix: str, normalize: bool
) -> Tensor:
    """Sums the outputs of each token's ``moe_router_topk`` most probable experts.

    Each output is multiplied by the expert's probability. With ``normalize``, the probabilities of
    a token's experts are first scaled to sum to 1.
    """
    flat = hidden.flatten(0, -2)
    probabilities = softmax(linear(flat, read(f"{prefix}gate.weight").float()), dim=-1)
    factors, experts = probabilities.topk(arch.moe_router_topk, dim=-1)  # [token, top k]
    if normalize:
        factors = factors / factors.sum(-1, keepdim=True)
    output = torch.zeros_like(flat)
    for expert in experts.unique().tolist():
        tokens, slots = torch.where(experts == expert)  # slot: the expert's index in the top k
        result = _gated_mlp(flat[tokens], read, f"{prefix}experts.{expert}.")
        output.index_add_(0, tokens, result * factors[tokens, slots, None])
    return output.view_as(hidden)
