"""Reads a model's shape from ``config.json``, and puts another shape into it. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nemo_convert.architecture import Architecture
from nemo_convert.config_keys import (
    BOOLEANS,
    GENERATION_KEYS,
    NEUTRAL_VALUES,
    require_numbers,
    require_types,
    require_valid_padding,
    require_version,
    unknown_keys,
    with_exact_types,
)
from nemo_convert.families import EXPERTS, FAMILIES, QK_NORM, QKV_BIAS, Family
from recipes.core.errors import RecipeError

SUPPORTED = tuple(FAMILIES)
"""Hugging Face architectures that can be converted."""
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Maps safetensors' name of each weight type that can be converted to PyTorch's name."""
DEFAULT_POSITIONS = 2048
"""transformers' default of ``max_position_embeddings`` for Llama."""
TRANSFORMERS_5 = ("rope_parameters", "num_local_experts", "dtype")
"""Keys in the spelling of transformers 5, which ``as_transformers_4`` renames."""
QUANTIZATION = ("compression_config", "quantization", "quantization_config")
"""Keys that describe how the weights were quantized."""


def as_transformers_4(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a ``config.json`` in a spelling that transformers 4 and 5 both read.

    transformers 5 writes ``rope_parameters: {rope_theta, rope_type, ...}``, ``dtype``, and for some
    models ``num_local_experts``. NeMo's importers use transformers 4, which ignores these keys and
    falls back on its own defaults, such as a ``rope_theta`` of 10,000. A RoPE scaling that leaves
    RoPE unchanged becomes null.

    Raises:
        RecipeError: ``rope_parameters`` are incomplete or differ from layer type to layer type,
            ``rope_scaling`` is not an object or contradicts itself, or a key of transformers 5
            contradicts one of 4.
    """
    new_values: dict[str, Any] = {}  # values of keys that transformers 4 reads
    if (experts := config.get("num_local_experts")) is not None:
        new_values["num_experts"] = experts
    if config.get("rope_parameters") is not None:
        new_values |= _split_rope_parameters(config, where)
    _require_no_contradiction(config, new_values, where)
    if (scaling := config.get("rope_scaling")) is not None:
        config = {**config, "rope_scaling": _normalize_scaling(scaling, where)}
    dtype = str(config.get("torch_dtype") or config.get("dtype")).removeprefix("torch.")
    if dtype in DTYPES.values():
        new_values["torch_dtype"] = dtype
    name = _first_name(config.get("architectures"))
    if config.get("model_type") is None and name in FAMILIES:  # model_type chooses the class
        new_values["model_type"] = FAMILIES[name].model_type
    # _attn_implementation may name a kernel that is not installed. GENERATION_KEYS belong in
    # generation_config.json.
    dropped = {"_attn_implementation", "torch_dtype", *TRANSFORMERS_5, *GENERATION_KEYS}
    dropped |= _unset_keys(config)
    unchanged = {key: value for key, value in config.items() if key not in dropped}
    return with_exact_types({**unchanged, **new_values})


def _require_no_contradiction(
    config: Mapping[str, Any], new_values: Mapping[str, Any], where: str
) -> None:
    """Refuses a config whose values differ from ``new_values``, which keys of version 5 set."""
    for key, new_value in new_values.items():
        key_of_5 = "num_local_experts" if key == "num_experts" else "rope_parameters"
        value = normalized = config.get(key)
        if value in (None, {}):
            continue
        loses_theta = False
        if key == "rope_scaling" and value:
            normalized = _normalize_scaling(value, where)
            # With rope_scaling, transformers 5 ignores rope_parameters, including their rope_theta.
            loses_theta = config.get("rope_theta") is None
        if loses_theta or normalized != new_value:
            what = f"{where}: {key}={value} contradicts {key_of_5}={config[key_of_5]}."
            raise RecipeError(what, f"remove {key} or {key_of_5}, whichever is wrong")


def _unset_keys(config: Mapping[str, Any]) -> set[str]:
    """Returns keys to remove: their value is null or a default, and means the same as no key.

    Some classes of transformers 4 or 5 do not accept null. For example, transformers 4 multiplies
    by ``partial_rotary_factor``. transformers loads a Mistral model with ``layer_types`` as a
    Ministral model, which fails without a window. For Qwen3, ``head_dim`` is not returned: an
    absent ``head_dim`` means 128, but a null one is an error.
    """
    # One of the two keys may be absent.
    names = {str(config.get("model_type")), _first_name(config.get("architectures"))}
    families = [f for f in FAMILIES.values() if names & {f.model_type, f.hf_architecture}]
    keys = {*NEUTRAL_VALUES, *QUANTIZATION, *BOOLEANS, "attention_dropout"}
    keys |= {"head_dim", "layer_types", "mlp_only_layers"}
    unset = {key for key in keys if config.get(key) is None}
    if any("head_dim" in family.defaults for family in families):
        unset -= {"head_dim"}
    if "mistral" in (family.model_type for family in families) and _has_full_attention(config):
        unset |= {"layer_types"}
    return unset


def _has_full_attention(config: Mapping[str, Any]) -> bool:
    """Returns whether ``layer_types`` is a list with full attention in each layer."""
    types: Any = config.get("layer_types")
    is_full = isinstance(types, list) and {*map(str, types)} == {"full_attention"}
    return is_full and len(types) == config.get("num_hidden_layers")


def _first_name(names: Any) -> str | None:
    return str(names[0]) if isinstance(names, list) and names else None


def _split_rope_parameters(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Splits ``rope_parameters`` of transformers 5 into ``rope_theta`` and ``rope_scaling``."""
    rope, outer_theta = config["rope_parameters"], config.get("rope_theta")
    # If layer types have different RoPE, transformers 5 nests: one mapping for each layer type.
    is_flat = isinstance(rope, Mapping) and not any(isinstance(v, Mapping) for v in rope.values())
    if not is_flat or (outer_theta is None and "rope_theta" not in rope):
        what = f"{where}: rope_parameters={rope} is not supported."
        raise RecipeError(what, "use a model with one rope_theta for all layers")
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    theta = rope.get("rope_theta", outer_theta)
    return {"rope_theta": theta, "rope_scaling": _normalize_scaling(scaling, where)}


def _normalize_scaling(scaling: object, where: str) -> dict[str, Any] | None:
    """Returns a scaling with ``rope_type``, not ``type``; ``None`` if it leaves RoPE unchanged."""
    if not isinstance(scaling, Mapping):
        raise RecipeError(f"{where}: rope_scaling={scaling} is not an object.", "set it to null")
    # Old files have the key "type" instead of "rope_type".
    result = {key: value for key, value in scaling.items() if key != "type"}
    rope_type = result.setdefault("rope_type", scaling.get("type", "default"))
    if scaling.get("type", rope_type) != rope_type:
        what = f"{where}: rope_scaling has type={scaling['type']} and rope_type={rope_type}."
        raise RecipeError(what, "remove the wrong one")
    if result.get("partial_rotary_factor") in (None, 1):
        result.pop("partial_rotary_factor", None)
    neutral_scalings: list[dict[str, Any]] = [{"rope_type": "default"}]
    neutral_scalings += [{"rope_type": name, "factor": 1} for name in ("default", "linear")]
    return None if result in neutral_scalings else result


def rope_theta(config: Mapping[str, Any]) -> float:
    """Returns the base of RoPE's frequencies, by default that of transformers for all families."""
    theta = config.get("rope_theta")
    return 10_000.0 if theta is None else float(theta)


def rms_norm_eps(config: Mapping[str, Any]) -> float:
    """Returns the epsilon of RMSNorm, by default that of transformers for all families."""
    eps = config.get("rms_norm_eps")
    return 1e-6 if eps is None else float(eps)


def read_architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Reads the shape in a ``config.json``. ``where`` is the model's path or id, for messages.

    Raises:
        RecipeError: A key is missing, invalid or not supported.
    """
    config = as_transformers_4(config, where)
    name = _architecture_name(config, where)
    if name not in FAMILIES:
        what = f"{where}: architecture {name} is not supported."
        raise RecipeError(what, f"use a model of one of: {', '.join(SUPPORTED)}")
    family = FAMILIES[name]
    config = {**family.defaults, **config}
    _require_sizes(family, config, where)
    require_numbers(config, where)
    require_version(config, where)
    require_types(config, where)
    require_valid_padding(config, where)
    _require_consistent_sizes(family, config, where)
    for what, fix in _unsupported_features(family, config):  # the error names only the first
        raise RecipeError(f"{where}: {what} is not supported for {name}.", fix)
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
        max_position_embeddings=config.get("max_position_embeddings", DEFAULT_POSITIONS),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        qkv_bias=family.has(QKV_BIAS),
        qk_layernorm=family.has(QK_NORM),
        **_expert_sizes(family, config),
    )


def _architecture_name(config: Mapping[str, Any], where: str) -> str:
    """Returns the class in ``architectures``. If there is none, returns that of ``model_type``.

    The two keys must agree, because transformers chooses the class by ``model_type`` alone.
    """
    model_type = config.get("model_type")
    names = {family.model_type: name for name, family in FAMILIES.items()}
    name = _first_name(config.get("architectures")) or names.get(str(model_type), "none")
    if name in FAMILIES and model_type not in (None, FAMILIES[name].model_type):
        what = f"{where}: model_type={model_type} contradicts architectures={name}."
        raise RecipeError(what, "correct config.json: transformers chooses the class by model_type")
    return str(name)


def _require_sizes(family: Family, config: Mapping[str, Any], where: str) -> None:
    """Refuses a config that lacks a size for which there is no default."""
    required = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"]
    required += ["vocab_size"]
    if family.has(EXPERTS):
        required += ["num_experts", "num_experts_per_tok", "moe_intermediate_size"]
    if missing := [repr(key) for key in required if key not in config]:
        what = f"{where}: config.json has no {', no '.join(missing)}."
        raise RecipeError(what, "download config.json again from the source of the model")


def _require_consistent_sizes(family: Family, config: Mapping[str, Any], where: str) -> None:
    """Refuses sizes that contradict each other, or that transformers or RoPE cannot use."""
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    experts, selected = config.get("num_experts"), config.get("num_experts_per_tok")
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if groups and heads % groups:
        what = f"num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}"
    elif experts and selected and selected > experts:
        what = f"num_experts_per_tok={selected} is more than num_experts={experts}"
    elif family.defaults.get("head_dim") and config["head_dim"] is None:
        what = "head_dim is null, which transformers does not accept for this family"
    elif family.has(EXPERTS) and groups is None:
        what = "num_key_value_heads is null, which transformers does not accept for this family"
    elif head_dim % 2:
        what = f"head_dim={head_dim} is odd, but RoPE rotates pairs of channels"
    else:
        return
    raise RecipeError(f"{where}: {what}.", "download config.json again, or correct it")


def with_shape(config: Mapping[str, Any], shape: Architecture) -> dict[str, Any]:
    """Returns a copy of a ``config.json`` with the sizes of ``shape``, of the same family."""
    sizes = {key: getattr(shape, field) for field, key in shape.megatron_to_hf().items()}
    changed = {**config, **sizes}
    # layer_types has one value per layer. Other values than "full_attention" are refused.
    if changed.get("layer_types"):
        changed["layer_types"] = ["full_attention"] * shape.num_layers
    return changed


def _expert_sizes(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """Returns the arguments of ``Architecture`` that only an MoE has."""
    if not family.has(EXPERTS):
        return {}
    return {
        "num_moe_experts": config["num_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
    }


def _unsupported_features(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (feature, how to fix it) for features that a family's NeMo model does not have."""
    # Maps keys to the values of model_type for which transformers reads the key.
    model_types = {"attention_bias": ("llama", "qwen3", "qwen3_moe"), "mlp_bias": ("llama",)}
    for name, types in model_types.items():
        if config.get(name):
            is_read = family.model_type in types
            fix = "use a model without it" if is_read else "remove it: transformers ignores it"
            yield f"{name}={config[name]}", fix
    supported_values = {"hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": []}
    for name, supported in supported_values.items():
        if config.get(name, supported) != supported:
            is_alias = config[name] == "swish"  # another name of silu
            fix = "set it to silu" if is_alias else f"use a model with {name}={supported}"
            yield f"{name}={config[name]}", fix
    normalizes_experts = family.has(EXPERTS) and config.get("norm_topk_prob")
    if normalizes_experts and config.get("num_experts_per_tok") == 1:
        # Megatron refuses a softmax over one selected expert, since its gradient is zero.
        fix = "use a model with num_experts_per_tok of 2 or more"
        yield "norm_topk_prob=true with num_experts_per_tok=1", fix
    # A published config of Qwen3 has the key use_qk_norm, which no library reads.
    is_qk_norm_correct = config.get("use_qk_norm") is family.has(QK_NORM)
    for key_and_value in unknown_keys(config):
        if key_and_value.startswith("use_qk_norm=") and is_qk_norm_correct:
            continue
        yield (
            key_and_value,
            "if it does not affect this model's output, remove it from config.json; if it affects "
            "no model's output, add it to nemo_convert/config_keys.py",
        )
    yield from _unsupported_layers_or_quantization(config)
    yield from _unsupported_scalings(family, config)
    yield from _unsupported_windows(family, config)


def _unsupported_layers_or_quantization(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    types, layers = config.get("layer_types"), config.get("num_hidden_layers", 0)
    if types is not None and not _has_full_attention(config):
        yield f"layer_types={types}", f"use a model with full_attention in all {layers} layers"
    for name in QUANTIZATION:
        if config.get(name) is not None:
            fix = f"use the unquantized model; if this one is not quantized, remove {name}"
            yield f"{name}={config[name]}", fix


def _unsupported_scalings(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    scaling, supported = config.get("rope_scaling"), family.rope_scaling
    # Any factor is supported, so the comparison ignores it.
    if scaling and {**scaling, "factor": None} != {**supported, "factor": None}:
        if "rope_theta" in scaling:
            fix = "move rope_theta out of it"
        elif nulls := [key for key, value in scaling.items() if value is None]:
            fix = f"remove {', '.join(nulls)}"
        elif supported:
            fix = f"use a model with rope_scaling={supported} and any factor"
        else:
            fix = "use a model with no rope_scaling"
        yield f"rope_scaling={scaling}", fix


def _unsupported_windows(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    positions = config.get("max_position_embeddings", DEFAULT_POSITIONS)
    window = config.get("sliding_window")
    # Mistral uses the window even if use_sliding_window is false.
    uses_window = family.model_type == "mistral" or config.get("use_sliding_window", True)
    if uses_window and family.model_type in ("qwen2", "qwen3"):
        first = config["max_window_layers"]  # index of the first layer with a window
        if type(first) is not int or first < 0:
            yield f"max_window_layers={first!r}", "set it to the number of layers without a window"
        elif _has_full_attention(config) or first >= config.get("num_hidden_layers", 0):
            uses_window = False
    if uses_window and window is not None and window < positions:
        fix = f"if no text is longer, set max_position_embeddings ({positions}) to {window}"
        is_llama = family.model_type == "llama"
        yield f"sliding_window={window}", "remove it: Llama has none" if is_llama else fix
