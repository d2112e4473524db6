"""A model's shape from Hugging Face's ``config.json``, and back. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nemo_convert.architecture import Architecture
from nemo_convert.config_keys import unknown_keys
from nemo_convert.families import EXPERTS, FAMILIES, QK_NORM, QKV_BIAS, Family
from recipes.core.errors import RecipeError

SUPPORTED = tuple(FAMILIES)
"""Hugging Face architectures that can be converted."""
DEFAULT_ROPE = {"rope_type": "default"}
DEFAULT_ROPE_THETA = 10_000.0
"""What transformers takes for every supported family where a config has no ``rope_theta``."""
TRANSFORMERS_5 = ("rope_parameters", "num_local_experts")
"""Keys that transformers 4 does not read."""


def as_transformers_4(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a ``config.json`` in a spelling that transformers 4 and 5 both read.

    transformers 5 writes ``rope_parameters: {rope_theta, rope_type, ...}``, and for some models
    ``num_local_experts``. transformers 4, which NeMo imports with, ignores both, and would take a
    ``rope_theta`` of 10,000.

    Raises:
        RecipeError: ``rope_parameters`` are incomplete, differ from layer type to layer type, or
            contradict another key.
    """
    renamed: dict[str, Any] = {}
    if (experts := config.get("num_local_experts")) is not None:
        renamed["num_experts"] = experts
    if (rope := config.get("rope_parameters")) is not None:
        renamed |= _theta_and_scaling(rope, where)
    for key, value in renamed.items():
        if config.get(key) not in (None, value):
            raise RecipeError(
                f"{where}: {key}={config[key]} contradicts {key}={value}, which is written as "
                "transformers 5 spells it.",
                f"remove the wrong one from config.json: {key}, or {' and '.join(TRANSFORMERS_5)}",
            )
    kept = {key: value for key, value in config.items() if key not in TRANSFORMERS_5}
    return {**kept, **renamed}


def _theta_and_scaling(rope: object, where: str) -> dict[str, Any]:
    """Returns ``rope_theta`` and ``rope_scaling`` of the ``rope_parameters`` of transformers 5."""
    is_flat = isinstance(rope, Mapping) and not any(isinstance(v, Mapping) for v in rope.values())
    if not isinstance(rope, Mapping) or not is_flat or "rope_theta" not in rope:
        raise RecipeError(
            f"{where}: rope_parameters={rope} is not supported.",
            "use a model whose rope_parameters have one rope_theta for all layers",
        )
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    is_default = scaling in ({}, DEFAULT_ROPE)
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if is_default else scaling}


def rope_theta(config: Mapping[str, Any]) -> float:
    """Returns the base of RoPE's frequencies in a ``config.json``."""
    theta = config.get("rope_theta")
    return DEFAULT_ROPE_THETA if theta is None else float(theta)


def read_architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """The shape in a ``config.json`` from ``where``; refuses what is missing or not supported."""
    config = as_transformers_4(config, where)
    name = (config.get("architectures") or ["none"])[0]
    if name not in FAMILIES:
        raise RecipeError(
            f"{where}: architecture {name} is not supported.",
            f"use a model of one of: {', '.join(SUPPORTED)}",
        )
    family = FAMILIES[name]
    config = {**family.defaults, **config}
    for what, fix in _unsupported(family, config):
        raise RecipeError(f"{where}: {what} is not supported for {name}.", fix)
    try:
        heads = config["num_attention_heads"]
        return Architecture(
            hf_architecture=name,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            tied_embeddings=config.get("tie_word_embeddings", False),
            qkv_bias=family.has(QKV_BIAS),
            qk_layernorm=family.has(QK_NORM),
            **_experts(family, config),
        )
    except KeyError as error:
        raise RecipeError(
            f"{where}: config.json has no {error}.", "transformers' save_pretrained writes it"
        ) from error


def with_shape(config: Mapping[str, Any], shape: Architecture) -> dict[str, Any]:
    """A model's ``config.json`` for another shape of the same family."""
    sizes = {hf: getattr(shape, megatron) for megatron, hf in shape.hf_names().items()}
    changed = {**config, **sizes}
    if "layer_types" in changed:  # one a layer, all the same: a sliding window is refused
        changed["layer_types"] = changed["layer_types"][: shape.num_layers]
    return changed


def _experts(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    if not family.has(EXPERTS):
        return {}
    return {
        "num_moe_experts": config["num_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
    }


def _unsupported(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (what, how to fix it) for features that a family's NeMo model does not have."""
    for name in ("attention_bias", "mlp_bias", "mlp_only_layers", "quantization_config"):
        if config.get(name):
            yield f"{name}={config[name]}", "use a model without it"
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        yield f"layer_types={config['layer_types']}", "use a model with full_attention alone"
    for name, only in (("hidden_act", "silu"), ("decoder_sparse_step", 1)):
        if config.get(name, only) != only:
            yield f"{name}={config[name]}", f"use a model with {only}"
    if (
        family.has(EXPERTS)
        and config.get("norm_topk_prob")
        and config.get("num_experts_per_tok") == 1
    ):
        yield "norm_topk_prob with one expert a token", "use a model of two or more"
    for key in unknown_keys(config):
        yield (
            key,
            "remove it from config.json if it cannot change what the model computes, and add it to "
            "nemo_convert/config_keys.py if it never does",
        )
    yield from _unsupported_positions(family, config)


def _unsupported_positions(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    scaling, known = config.get("rope_scaling") or DEFAULT_ROPE, family.rope_scaling
    same = known and {**known, **scaling, "factor": None} == {**known, "factor": None}
    if scaling != DEFAULT_ROPE and not same:
        builds = f"{known}, with any factor" if known else "none"
        yield f"rope_scaling={scaling}", f"NeMo builds {builds}"
    positions, window = config.get("max_position_embeddings", 2048), config.get("sliding_window")
    if config.get("use_sliding_window", True) and window is not None and window < positions:
        yield (
            f"sliding_window={window}",
            f"its {positions} positions see only {window} tokens: set max_position_embeddings to "
            f"{window} in its config.json, if no text will be longer",
        )
