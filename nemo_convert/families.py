"""How each model family maps between Hugging Face and NeMo. Adding a family is adding a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from recipes.architecture import Architecture


@dataclass(frozen=True)
class Weight:
    """One Megatron weight and the Hugging Face weights it is made of.

    ``{i}`` in a name is the layer. ``shape`` is the whole weight's, without parallelism.
    ``merge`` builds it from the Hugging Face ones, ``split`` undoes that; both move values
    without changing them.
    """

    megatron: str
    hf: tuple[str, ...]
    shape: Callable[[Architecture], tuple[int, ...]]
    merge: Callable[[Architecture, list[torch.Tensor]], torch.Tensor]
    split: Callable[[Architecture, torch.Tensor], list[torch.Tensor]]

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "{i}" in self.megatron


@dataclass(frozen=True)
class Family:
    """A row of the table."""

    hf_architecture: str
    importer: str
    """NeMo's importer class (module:name). It knows the NeMo config; the weights move by our rows,
    since NeMo's own conversion loads the model twice and drops the chat template."""
    model: str
    """NeMo's model class (module:name)."""
    weights: tuple[Weight, ...]

    def weights_of(self, architecture: Architecture) -> Iterator[tuple[Weight, int | None]]:
        """Every weight of a model of that shape, with its layer."""
        for weight in self.weights:
            if weight.megatron == OUTPUT_LAYER and architecture.tied_embeddings:
                continue
            if weight.per_layer:
                yield from ((weight, layer) for layer in range(architecture.num_layers))
            else:
                yield weight, None

    def rows(self, architecture: Architecture) -> dict[str, tuple[Weight, str]]:
        """The same by Megatron name, with the layer as it stands in names."""
        numbered = ((w, "" if i is None else str(i)) for w, i in self.weights_of(architecture))
        return {w.megatron.replace("{i}", index): (w, index) for w, index in numbered}


OUTPUT_LAYER = "output_layer.weight"


def _same(name: str, hf: str, shape: Callable[[Architecture], tuple[int, ...]]) -> Weight:
    return Weight(name, (hf,), shape, lambda _, tensors: tensors[0], lambda _, tensor: [tensor])


def _norm(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size,)


def _vocabulary(arch: Architecture) -> tuple[int, ...]:
    return (arch.vocab_size, arch.hidden_size)


def _merge_qkv(arch: Architecture, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Interleaves by query group: [q … q, k, v] per group, as Megatron stores them."""
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


def _halves(_: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
    return [half.contiguous() for half in tensor.chunk(2)]


_LAYER, _HF = "decoder.layers.{i}.", "model.layers.{i}."
_DENSE = (
    _same("embedding.word_embeddings.weight", "model.embed_tokens.weight", _vocabulary),
    _same(
        f"{_LAYER}self_attention.linear_qkv.layer_norm_weight",
        f"{_HF}input_layernorm.weight",
        _norm,
    ),
    Weight(
        f"{_LAYER}self_attention.linear_qkv.weight",
        tuple(f"{_HF}self_attn.{p}_proj.weight" for p in "qkv"),
        lambda a: ((a.num_attention_heads + 2 * a.num_query_groups) * a.kv_channels, a.hidden_size),
        _merge_qkv,
        _split_qkv,
    ),
    _same(
        f"{_LAYER}self_attention.linear_proj.weight",
        f"{_HF}self_attn.o_proj.weight",
        lambda a: (a.hidden_size, a.num_attention_heads * a.kv_channels),
    ),
    _same(
        f"{_LAYER}mlp.linear_fc1.layer_norm_weight",
        f"{_HF}post_attention_layernorm.weight",
        _norm,
    ),
    Weight(
        f"{_LAYER}mlp.linear_fc1.weight",
        (f"{_HF}mlp.gate_proj.weight", f"{_HF}mlp.up_proj.weight"),
        lambda a: (2 * a.ffn_hidden_size, a.hidden_size),
        _concat,
        _halves,
    ),
    _same(
        f"{_LAYER}mlp.linear_fc2.weight",
        f"{_HF}mlp.down_proj.weight",
        lambda a: (a.hidden_size, a.ffn_hidden_size),
    ),
    _same("decoder.final_layernorm.weight", "model.norm.weight", _norm),
    _same(OUTPUT_LAYER, "lm_head.weight", _vocabulary),
)
_NEMO = "nemo.collections.llm.gpt.model"

FAMILIES = {
    family.hf_architecture: family
    for family in (
        Family(
            "LlamaForCausalLM",
            f"{_NEMO}.llama:HFLlamaImporter",
            f"{_NEMO}.llama:LlamaModel",
            _DENSE,
        ),
    )
}

LOCAL_SPEC_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Names in Megatron's local layer spec, and the table's, which are TransformerEngine's."""


def canonical_name(name: str) -> str:
    """A parameter's name in the table, whichever layer spec the model was built with."""
    for local, canonical in LOCAL_SPEC_NAMES.items():
        if name.endswith(local):
            return name.removesuffix(local) + canonical
    return name


def load(path: str) -> Any:
    """Imports ``module:name``."""
    import importlib

    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
