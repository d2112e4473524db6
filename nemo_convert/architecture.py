"""Shapes of models, and the parameter counts that follow from a shape. Torch-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

HF_SIZE_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
}
"""Maps Megatron's names of the sizes that pruning may change to the keys of ``config.json``."""
HF_EXPERT_SIZE_KEYS = {
    "num_moe_experts": "num_experts",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}
"""Like ``HF_SIZE_KEYS``, for the sizes that only an MoE has."""


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
    """0 for a dense model."""
    moe_router_topk: int = 0
    """Experts per token."""
    moe_ffn_hidden_size: int = 0
    """Width of one expert. In an MoE, no weight has the size ``ffn_hidden_size``."""
    moe_shared_expert_intermediate_size: int = 0
    """Width of the shared expert, which every token uses; 0 if there is none."""
    qkv_bias: bool = False
    qk_layernorm: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for manifests."""
        return asdict(self)

    def megatron_to_hf(self) -> dict[str, str]:
        """Maps Megatron's names of this model's prunable sizes to the keys of ``config.json``."""
        return HF_SIZE_KEYS | (HF_EXPERT_SIZE_KEYS if self.num_moe_experts else {})

    def parameters(self) -> int:
        """Counts the parameters of the built model; tied weights count once."""
        vocabulary = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        layer = self._layer_matrices(self.num_moe_experts) + self._layer_vectors()
        final_norm = self.hidden_size
        return self.num_layers * layer + vocabulary + final_norm

    def active_weights(self) -> int:
        """Counts the weights that one token is multiplied with in matrix multiplications.

        Of an MoE's experts, only ``moe_router_topk`` count. The input embedding does not count,
        because it is a lookup. The output layer does.
        """
        layer = self._layer_matrices(self.moe_router_topk)
        return self.num_layers * layer + self.vocab_size * self.hidden_size

    def _layer_matrices(self, num_experts: int) -> int:
        """Counts the parameters of a layer's matrices, including ``num_experts`` of its experts.

        All rows of the router count, one for each expert of the layer.
        """
        # One axis of every matrix is hidden_size. The variables are sums of the other axes.
        # The factors: 2 for q and o, 2 for k and v, 3 for gate, up and down.
        attention = (2 * self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels
        mlp, router = self.ffn_hidden_size, 0
        if self.num_moe_experts:
            mlp = num_experts * self.moe_ffn_hidden_size + self.moe_shared_expert_intermediate_size
            router = self.num_moe_experts
        return self.hidden_size * (attention + 3 * mlp + router)

    def _layer_vectors(self) -> int:
        """Counts the parameters of a layer's norms and biases."""
        size = 2 * self.hidden_size  # the norms before attention and before the MLP
        if self.qkv_bias:
            size += self.kv_channels * (self.num_attention_heads + 2 * self.num_query_groups)
        if self.qk_layernorm:
            size += 2 * self.kv_channels
        return size
