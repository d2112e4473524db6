"""A plain PyTorch forward pass of every supported family: the reference of the parity gates.

The pass follows the config as ``hf_config`` reads it. It shares no code with transformers or
Megatron: if one of these libraries reads a key differently, its logits differ. Weights have
their Hugging Face names and layout. One layer is in memory at a time, in float32.
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
"""Reads a weight by its Hugging Face name."""


def reference_logits(
    config: Mapping[str, Any], read: ReadWeight, tokens: Tensor, positions: Tensor
) -> Tensor:
    """Computes the logits of a decoder-only transformer, in float32.

    Args:
        config: ``config.json`` in the spelling of transformers 4 (``as_transformers_4``).
        read: Reads a weight of any dtype.
        tokens: Token ids [batch, sequence].
        positions: RoPE position of each token [sequence]. Attention is causal in the order of the
            tokens, whatever the positions are.

    Returns:
        Logits [batch, sequence, vocabulary].
    """
    shape, eps = read_architecture(config, "config.json"), rms_norm_eps(config)

    def weight(name: str) -> Tensor:
        return read(f"{name}.weight").float()

    cos_sin = _rotations(config, shape.kv_channels, positions)
    hidden = embedding(tokens, weight("model.embed_tokens"))
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        normed = _rms_norm(hidden, weight(f"{prefix}input_layernorm"), eps)
        hidden = hidden + _attention(normed, shape, read, f"{prefix}self_attn.", cos_sin, eps)
        normed = _rms_norm(hidden, weight(f"{prefix}post_attention_layernorm"), eps)
        if shape.num_moe_experts:
            normalize = config.get("norm_topk_prob", False)
            hidden = hidden + _experts(normed, shape, read, f"{prefix}mlp.", normalize)
        else:
            hidden = hidden + _gated_mlp(normed, read, f"{prefix}mlp.")
    hidden = _rms_norm(hidden, weight("model.norm"), eps)
    return linear(hidden, weight("model.embed_tokens" if shape.tied_embeddings else "lm_head"))


def inverse_frequencies(config: Mapping[str, Any], dim: int) -> Tensor:
    """Returns the rotation of each pair of channels in radians per position, float64 [dim / 2].

    Llama 3.1's scaling keeps high frequencies, divides low ones by ``factor``, and interpolates
    between them: https://github.com/meta-llama/llama-models, ``apply_scaling`` in
    ``models/llama3/model.py``.

    Raises:
        ValueError: The type of scaling is neither ``default`` nor ``llama3``.
    """
    frequencies = rope_theta(config) ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    if scaling["rope_type"] == "default":
        return frequencies
    if scaling["rope_type"] != "llama3":
        raise ValueError(f"the reference does not support the RoPE scaling {scaling}")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # Rotations of each pair within the original context. With many of them, ``unscaled`` is 1, and
    # the frequency stays the same. With few, it is 0, and the factor divides the frequency.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (unscaled + (1 - unscaled) / scaling["factor"])


def _rotations(config: Mapping[str, Any], dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines [sequence, dim] of RoPE's angles, equal in both halves of dim."""
    angles = torch.outer(positions.double(), inverse_frequencies(config, dim)).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)


def _attention(
    hidden: Tensor,
    shape: Architecture,
    read: ReadWeight,
    prefix: str,
    cos_sin: tuple[Tensor, Tensor],
    eps: float,
) -> Tensor:
    """Computes causal grouped-query attention [batch, sequence, hidden]."""
    batch, length, _ = hidden.shape

    def project(letter: str) -> Tensor:
        """Returns heads [batch, heads, sequence, channels] of ``q``, ``k`` or ``v``."""
        bias = read(f"{prefix}{letter}_proj.bias").float() if shape.qkv_bias else None
        heads = linear(hidden, read(f"{prefix}{letter}_proj.weight").float(), bias)
        heads = heads.view(batch, length, -1, shape.kv_channels)
        if shape.qk_layernorm and letter in "qk":
            heads = _rms_norm(heads, read(f"{prefix}{letter}_norm.weight").float(), eps)
        return heads.transpose(1, 2)

    queries, keys = (_rotate(project(letter), *cos_sin) for letter in "qk")
    per_group = shape.num_attention_heads // shape.num_query_groups
    keys, values = (x.repeat_interleave(per_group, dim=1) for x in (keys, project("v")))
    scores = queries @ keys.transpose(2, 3) / math.sqrt(shape.kv_channels)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    attended = softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ values
    merged = attended.transpose(1, 2).reshape(batch, length, -1)
    return linear(merged, read(f"{prefix}o_proj.weight").float())


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of channels, ``i`` and ``i + dim / 2``."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def _gated_mlp(hidden: Tensor, read: ReadWeight, prefix: str) -> Tensor:
    gate, up, down = (read(f"{prefix}{p}_proj.weight").float() for p in ("gate", "up", "down"))
    return linear(silu(linear(hidden, gate)) * linear(hidden, up), down)


def _experts(
    hidden: Tensor, shape: Architecture, read: ReadWeight, prefix: str, normalize: bool
) -> Tensor:
    """Sums the outputs of each token's ``moe_router_topk`` most probable experts.

    Each output is multiplied by the expert's probability. With ``normalize``, these factors of a
    token sum to 1.
    """
    flat = hidden.flatten(0, -2)
    probabilities = softmax(linear(flat, read(f"{prefix}gate.weight").float()), dim=-1)
    weights, experts = probabilities.topk(shape.moe_router_topk, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    output = torch.zeros_like(flat)
    for expert in experts.unique().tolist():
        token, slot = torch.where(experts == expert)
        result = _gated_mlp(flat[token], read, f"{prefix}experts.{expert}.")
        output.index_add_(0, token, result * weights[token, slot, None])
    return output.view_as(hidden)
