"""Patches functions that a rehearsal cannot run.

A rehearsal runs one rank of a stage on fake tensors, which have no values. So it cannot run
functions that read tensor values, or need other ranks or TransformerEngine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import no_init_weights

from recipes.backend.patches import Patch, apply, constant, patches, replace_with, wrap
from recipes.distillation import vocabulary
from recipes.rehearsal import checkpoints, fake_cuda


def install() -> None:
    """Applies ``PATCHES`` and the patches of ``checkpoints`` for the rest of the process.

    Raises:
        RecipeError: A patched function is not the version that the patch was written for.
    """
    checkpoints.install()
    # The fake device computes the logits in chunks of the same size as a GPU does.
    vocabulary.CHUNK_BYTES[fake_cuda.NAME] = vocabulary.CHUNK_BYTES["cuda"]
    apply(PATCHES)


def _with_last_losses(original: Callable[..., None], self: Any, objective: Any) -> None:
    """Sets placeholder losses of 1, in place of the losses that the last pipeline stage sends."""
    original(self, objective)
    self.last_means = dict.fromkeys(("loss", *objective.weights), 1.0)


def _without_context_parallelism(
    original: Callable[..., None], self: Any, config: Any, *args: Any, **kwargs: Any
) -> None:
    """Makes each rank attend only to its own shard of the sequence.

    Megatron's own attention refuses a ``context_parallel_size`` above 1, so this size is 1 while
    the attention is built. Inputs and outputs still have the shapes of context parallelism.
    """
    context_parallel_size = config.context_parallel_size
    config.context_parallel_size = 1
    original(self, config, *args, **kwargs)
    config.context_parallel_size = context_parallel_size


def _keep_object(value: Any, src: int = 0, group: Any = None) -> Any:
    """Returns this rank's own object, in place of the object that rank ``src`` broadcasts."""
    return value


def _accept_parity(original: object, parity: Any, what: str) -> Any:
    """Returns a comparison of two models' logits without checking that the logits are equal."""
    return parity


def _load_causal_lm(folder: Path) -> PreTrainedModel:
    """Builds a model from its config, on the CPU, without loading weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def _with_equal_experts(
    original: Callable[..., Tensor], self: Any, routing_map: Tensor
) -> np.ndarray:
    """Routes the same number of tokens to each expert; returns the tokens per local expert.

    Sets the same attributes as Megatron's method. Their values are NumPy arrays, because fake
    tensors have no values.
    """
    original(self, routing_map)  # sets ``num_out_tokens``, which does not depend on values
    tokens_per_expert, remainder = divmod(self.num_out_tokens, self.num_experts)
    # The number of tokens for each expert. The first ``remainder`` experts get one more.
    sent = tokens_per_expert + (np.arange(self.num_experts) < remainder)
    sent_to_local: np.ndarray = sent[self.local_expert_indices]
    ranks = self.tp_size * self.ep_size
    if ranks > 1:
        self.input_splits = sent.reshape(self.ep_size, -1).sum(axis=1)
        self.output_splits = np.full(self.ep_size, sent_to_local.sum())
        self.output_splits_tp = np.full(self.tp_size, self.ep_size * sent_to_local.sum())
    self.num_global_tokens_per_local_expert = np.tile(sent_to_local, (ranks, 1))
    received: np.ndarray = sent_to_local * ranks  # every rank sends the same number of tokens
    return received


def _permute(
    tokens: Tensor, routing_map: Tensor, probs: Tensor, num_out_tokens: int, **settings: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a row per pair of token and expert, and each row's probability and token index.

    Megatron's function reads the token indices from ``routing_map``, which has no values here. So
    the indices are not initialized: only the shapes matter.
    """
    indices = routing_map.new_empty(num_out_tokens, dtype=torch.int64)
    row_probs = probs.T.contiguous().flatten().index_select(0, indices)
    return tokens.index_select(0, indices), row_probs, indices


NO_MASK = "with TransformerEngine, NeMo needs no attention mask"
"""Reason to set NeMo's ``HAVE_TE``. A rehearsal represents a GPU run, with TransformerEngine."""
PATCHES = (
    *patches(
        "megatron.core.",
        (
            "transformer.dot_product_attention:DotProductAttention.__init__",
            "context parallelism needs TransformerEngine",
            "cde501e0d411",
            wrap(_without_context_parallelism),
        ),
        (
            "transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.preprocess",
            "the tokens of an expert depend on values; here all experts get the same number",
            "df692d802fdd",
            wrap(_with_equal_experts),
        ),
        (
            "transformer.moe.token_dispatcher:permute",
            "the number of rows depends on values",
            "782a5e8fd925",
            replace_with(_permute),
        ),
    ),
    *patches(
        "nemo.collections.llm.gpt.",
        ("model.base:HAVE_TE", NO_MASK, "bool", replace_with(True)),
        ("data.pre_training:HAVE_TE", NO_MASK, "bool", replace_with(True)),
    ),
    Patch(
        "torch.distributed.device_mesh:DeviceMesh.from_group",
        "a mesh reads rank numbers from a tensor, which has no values",
        "4c1191ab40e9",
        constant(None),
    ),
    Patch(
        "modelopt.torch.utils.distributed:broadcast",
        "a received object has no values; here each rank keeps its own object",
        "d9f91addda52",
        replace_with(_keep_object),
    ),
    Patch(
        "recipes.distillation.objective:LossReduction.__init__",
        "the last pipeline stage is another rank, which does not run",
        "",
        wrap(_with_last_losses),
    ),
    *patches(
        "nemo_convert.parity:",
        ("load_causal_lm", "a rehearsal has no weights to load", "", replace_with(_load_causal_lm)),
        ("Parity.require", "parity compares values", "", wrap(_accept_parity)),
    ),
)
