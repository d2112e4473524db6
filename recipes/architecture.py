"""Model shapes and closed-form counts, from ``config.json`` alone and without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from nemo_convert.families import FAMILIES, Family
from recipes.errors import RecipeError

SUPPORTED = tuple(FAMILIES)
"""Hugging Face architectures that can be converted."""
DENSE_AXES = ("ffn_hidden_size",)
EXPERT_AXES = ("num_moe_experts", "moe_ffn_hidden_size")
"""What can be pruned of the feed-forward layers."""
DEFAULT_ROPE = {"rope_type": "default"}
HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
}
"""Megatron's and Hugging Face's names of what pruning can change or must make explicit."""
HF_EXPERT_NAMES = {
    "num_moe_experts": "num_experts",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}


@dataclass(frozen=True)
class Architecture:
    """Shape of a decoder-only transformer, in Megatron's terms."""

    hf_architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    num_moe_experts: int = 0
    """0 where the feed-forward layers are dense."""
    moe_router_topk: int = 0
    """Experts that a token goes through."""
    moe_ffn_hidden_size: int = 0
    """Width of one expert; ``ffn_hidden_size`` is then of no weight."""
    moe_shared_expert_intermediate_size: int = 0
    """Width of the expert that every token goes through, 0 where there is none."""
    qkv_bias: bool = False
    qk_layernorm: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for manifests."""
        return asdict(self)

    def hf_names(self) -> dict[str, str]:
        """Those of ``HF_NAMES`` that such a model has."""
        return HF_NAMES | (HF_EXPERT_NAMES if self.num_moe_experts else {})

    def parameters(self) -> int:
        """Number of parameters, equal to what the built model has (tied weights counted once)."""
        vocabulary = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        layer = self._layer_matrices(self.num_moe_experts) + self._layer_vectors()
        return self.num_layers * layer + vocabulary + self.hidden_size

    def forward_flops_per_token(self) -> int:
        """Matrix-multiplication FLOPs of one token's forward pass, attention scores left out.

        Of the experts, those that a token goes through count.
        """
        layer = self._layer_matrices(self.moe_router_topk)
        return 2 * (self.num_layers * layer + self.vocab_size * self.hidden_size)

    def _layer_matrices(self, experts: int) -> int:
        """Parameters in a layer's matrices, with so many of its experts."""
        heads, groups = self.num_attention_heads, self.num_query_groups
        rows = self.kv_channels * (2 * heads + 2 * groups)
        if self.num_moe_experts:
            shared = self.moe_shared_expert_intermediate_size
            rows += 3 * (experts * self.moe_ffn_hidden_size + shared) + self.num_moe_experts
        else:
            rows += 3 * self.ffn_hidden_size
        return self.hidden_size * rows

    def _layer_vectors(self) -> int:
        """Parameters in a layer's norms and biases."""
        bias = self.kv_channels * (self.num_attention_heads + 2 * self.num_query_groups)
        return (
            2 * self.hidden_size + self.qkv_bias * bias + self.qk_layernorm * 2 * self.kv_channels
        )


def read_architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Reads the shape from a Hugging Face ``config.json``.

    Args:
        config: Content of the file.
        where: Where it came from, for messages.

    Raises:
        RecipeError: The architecture or a feature is not supported, or a size is missing.
    """
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
            qkv_bias=family.qkv_bias,
            qk_layernorm=family.qk_layernorm,
            **_experts(family, config),
        )
    except KeyError as error:
        raise RecipeError(f"{where}: config.json has no {error}.") from error


def with_shape(config: Mapping[str, Any], shape: Architecture) -> dict[str, Any]:
    """A model's ``config.json`` for another shape of the same family."""
    sizes = {hf: getattr(shape, megatron) for megatron, hf in shape.hf_names().items()}
    changed = {**config, **sizes}
    if "layer_types" in changed:  # one a layer, all the same: a sliding window is refused
        changed["layer_types"] = changed["layer_types"][: shape.num_layers]
    return changed


def _experts(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    if not family.experts:
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
    if family.experts and config.get("norm_topk_prob") and config.get("num_experts_per_tok") == 1:
        yield "norm_topk_prob with one expert a token", "use a model of two or more"
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


@dataclass(frozen=True)
class Targets:
    """What to prune to; ``None`` leaves an axis as it is. ``drop_layers`` counts from 1."""

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    num_query_groups: int | None = None
    drop_layers: tuple[int, ...] = ()

    def width(self) -> dict[str, int]:
        """The width axes that are set, by Megatron's names."""
        heads = ("num_attention_heads", "num_query_groups")
        axes = ("hidden_size", *heads, *DENSE_AXES, *EXPERT_AXES)
        return {axis: value for axis in axes if (value := getattr(self, axis)) is not None}


def pruned(teacher: Architecture, targets: Targets) -> Architecture:
    """The student's shape. ``kv_channels`` stays the teacher's: heads go, their size does not.

    Query groups go with their heads, unless the number of heads is a target, too.
    """
    layers = targets.num_layers
    if targets.drop_layers:
        layers = teacher.num_layers - len(targets.drop_layers)
    width: dict[str, Any] = targets.width()
    if targets.num_query_groups and not targets.num_attention_heads:
        per_group = teacher.num_attention_heads // teacher.num_query_groups
        width["num_attention_heads"] = per_group * targets.num_query_groups
    return replace(teacher, num_layers=layers or teacher.num_layers, **width)


def target_problems(
    teacher: Architecture, targets: Targets, divisors: Mapping[str, int]
) -> Iterable[tuple[str, str]]:
    """Yields (what is wrong, how to fix it) for targets that the axes cannot take."""
    if not targets.width() and targets.num_layers is None and not targets.drop_layers:
        yield "no target is set", "set at least one target_* field or drop_layers"
    wrong = DENSE_AXES if teacher.num_moe_experts else EXPERT_AXES
    for axis, target in {**targets.width(), "num_layers": targets.num_layers}.items():
        if axis in wrong:
            kind, axes = ("experts", EXPERT_AXES) if axis in DENSE_AXES else ("dense", DENSE_AXES)
            yield (
                f"target_{axis}={target} is set, but the teacher's feed-forward layers are {kind}",
                f"set {' or '.join(f'target_{a}' for a in axes)}",
            )
        elif target is not None:
            yield from _axis_problems(axis, target, getattr(teacher, axis), divisors.get(axis, 1))
    yield from _head_problems(teacher, targets)
    if 0 < (targets.num_moe_experts or 0) < teacher.moe_router_topk:
        yield (
            f"target_num_moe_experts={targets.num_moe_experts} is less than the "
            f"{teacher.moe_router_topk} that each token goes through",
            f"use at least {teacher.moe_router_topk}",
        )
    yield from _drop_layer_problems(teacher, targets)


def _axis_problems(axis: str, target: int, have: int, divisor: int) -> Iterable[tuple[str, str]]:
    name = f"target_{axis}={target}"
    if divisor < 1:
        yield f"{axis}_divisor={divisor} is not positive", "use 1 or more"
    elif target > have:
        yield f"{name} is larger than the teacher's {have}", f"use at most {have}"
    elif target < 1:
        yield f"{name} is not positive", f"use 1 to {have}"
    elif target != have and target % divisor:
        low = target // divisor * divisor
        choices = " or ".join(str(c) for c in (low, low + divisor) if 0 < c <= have)
        yield (
            f"{name} is not a multiple of {axis}_divisor={divisor}",
            f"use {choices}, or a divisor of {target}" if choices else f"set a divisor of {target}",
        )


def _head_problems(teacher: Architecture, targets: Targets) -> Iterable[tuple[str, str]]:
    """Every group that stays has as many heads as any other, and no more than it had."""
    groups = targets.num_query_groups or teacher.num_query_groups
    heads = targets.num_attention_heads
    most = teacher.num_attention_heads // teacher.num_query_groups * groups
    if heads is None or not 0 < heads <= teacher.num_attention_heads or groups < 1:
        return
    if heads % groups:
        yield (
            f"target_num_attention_heads={heads} is not a multiple of the {groups} query groups",
            f"use a multiple of {groups}",
        )
    elif heads > most:
        yield (
            f"target_num_attention_heads={heads} is more than the {most} heads that the teacher "
            f"has in {groups} query groups",
            f"use at most {most}",
        )


def _drop_layer_problems(teacher: Architecture, targets: Targets) -> Iterable[tuple[str, str]]:
    drop = targets.drop_layers
    if drop and targets.num_layers is not None:
        yield "drop_layers and target_num_layers are both set", "set one of them"
    wrong = [layer for layer in drop if not 1 <= layer <= teacher.num_layers]
    if wrong:
        yield f"drop_layers has {wrong}", f"layers are numbered 1 to {teacher.num_layers}"
    if len(set(drop)) != len(drop):
        yield f"drop_layers={list(drop)} names a layer twice", "name each layer once"
    if len(set(drop)) >= teacher.num_layers:
        yield "drop_layers leaves no layer", "keep at least one layer"
