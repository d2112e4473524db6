"""Model shapes and closed-form counts, from ``config.json`` alone and without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from recipes.errors import RecipeError

SUPPORTED = ("LlamaForCausalLM",)
"""Hugging Face architectures that can be converted; ``nemo_convert.families`` says how."""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What NeMo's Llama 3.1 config assumes; it reads only the factor from the model."""


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

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for manifests."""
        return asdict(self)

    def parameters(self) -> int:
        """Number of parameters, equal to what the built model has (tied weights counted once)."""
        heads, groups = self.num_attention_heads, self.num_query_groups
        attention = self.hidden_size * self.kv_channels * (2 * heads + 2 * groups)
        mlp = 3 * self.hidden_size * self.ffn_hidden_size
        norms = 2 * self.hidden_size
        vocabulary = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * (attention + mlp + norms) + vocabulary + self.hidden_size

    def forward_flops_per_token(self) -> int:
        """Matrix-multiplication FLOPs of one token's forward pass, attention scores left out."""
        norms = self.num_layers * 2 * self.hidden_size + self.hidden_size
        embedding = 0 if self.tied_embeddings else self.vocab_size * self.hidden_size
        return 2 * (self.parameters() - norms - embedding)


def read_architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Reads the shape from a Hugging Face ``config.json``.

    Args:
        config: Content of the file.
        where: Where it came from, for messages.

    Raises:
        RecipeError: The architecture is not supported, or a size is missing.
    """
    name = (config.get("architectures") or ["none"])[0]
    if name not in SUPPORTED:
        raise RecipeError(
            f"{where}: architecture {name} is not supported.",
            f"use a model of one of: {', '.join(SUPPORTED)}",
        )
    for bias in ("attention_bias", "mlp_bias"):
        if config.get(bias):
            raise RecipeError(f"{where}: {bias} is set; biases of {name} are not supported.")
    scaling = config.get("rope_scaling")
    if scaling and {**LLAMA3_ROPE, **scaling, "factor": None} != {**LLAMA3_ROPE, "factor": None}:
        raise RecipeError(
            f"{where}: rope_scaling={scaling} is not supported.",
            f"NeMo builds Llama 3's, with any factor: {LLAMA3_ROPE}",
        )
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
        )
    except KeyError as error:
        raise RecipeError(f"{where}: config.json has no {error}.") from error


@dataclass(frozen=True)
class Targets:
    """What to prune to; ``None`` leaves an axis as it is. ``drop_layers`` counts from 1."""

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    drop_layers: tuple[int, ...] = ()

    def width(self) -> dict[str, int]:
        """The width axes that are set, by Megatron's names."""
        axes = ("hidden_size", "ffn_hidden_size", "num_attention_heads")
        return {axis: value for axis in axes if (value := getattr(self, axis)) is not None}


def pruned(teacher: Architecture, targets: Targets) -> Architecture:
    """The student's shape. ``kv_channels`` stays the teacher's: heads go, their size does not."""
    layers = targets.num_layers
    if targets.drop_layers:
        layers = teacher.num_layers - len(targets.drop_layers)
    width: dict[str, Any] = targets.width()
    return replace(teacher, num_layers=layers or teacher.num_layers, **width)


def target_problems(
    teacher: Architecture, targets: Targets, divisors: Mapping[str, int]
) -> Iterable[tuple[str, str]]:
    """Yields (what is wrong, how to fix it) for targets that the axes cannot take."""
    if not targets.width() and targets.num_layers is None and not targets.drop_layers:
        yield "no target is set", "set at least one target_* field or drop_layers"
    for axis, target in {**targets.width(), "num_layers": targets.num_layers}.items():
        if target is not None:
            yield from _axis_problems(axis, target, getattr(teacher, axis), divisors.get(axis, 1))
    heads, groups = targets.num_attention_heads, teacher.num_query_groups
    if heads and 0 < heads <= teacher.num_attention_heads and heads % groups:
        yield (
            f"target_num_attention_heads={heads} is not a multiple of the teacher's {groups} "
            "query groups, which the pinned ModelOpt cannot prune",
            f"use a multiple of {groups}",
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
