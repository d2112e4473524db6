"""Replaces library functions that need values, other ranks, or TransformerEngine.

A process that has called ``stand_in`` can only rehearse.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import random
from megatron.core.transformer import cuda_graphs
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe import token_dispatcher
from nemo.collections.llm.gpt.data import pre_training
from nemo.collections.llm.gpt.model import base
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import no_init_weights

from nemo_convert import parity
from recipes.distillation import objective, vocabulary
from recipes.rehearsal import checkpoints, fake_cuda


def stand_in() -> None:
    """Replaces all of them for the rest of the process."""
    checkpoints.stand_in()
    vocabulary.CHUNK_BYTES[fake_cuda.NAME] = vocabulary.CHUNK_BYTES["cuda"]
    _wrap(objective.LossReduction, "__init__", _with_last_losses)
    # Attention with context parallelism needs TransformerEngine.
    _wrap(DotProductAttention, "__init__", _without_context_parallelism)
    for module in (base, pre_training):  # with TransformerEngine, NeMo makes no attention mask
        setattr(module, "HAVE_TE", True)
    # CUDA captures graphs, with TransformerEngine's random numbers. Here layers just run.
    setattr(cuda_graphs._CudagraphGlobalRecord, "create_cudagraphs", lambda: None)
    _wrap(cuda_graphs.ArgMetadata, "__init__", _with_tensor_type)
    _wrap(random, "initialize_rng_tracker", _with_graph_safe_rng)
    # NeMo always makes a mesh of ranks. That needs rank numbers in a tensor, which has no values.
    setattr(DeviceMesh, "from_group", lambda *args, **kwargs: None)
    # Transformers runs on the CPU. Without values there is no parity to check.
    setattr(parity, "load_causal_lm", _load_causal_lm)
    setattr(parity.Parity, "require", lambda result, what: result)
    # How many tokens each expert gets depends on values; here all get the same number.
    _wrap(token_dispatcher.MoEAlltoAllTokenDispatcher, "preprocess", _with_equal_experts)
    setattr(token_dispatcher, "permute", _permute)


def _wrap(owner: object, name: str, wrapper: Callable[..., Any]) -> None:
    """Replaces a function by ``wrapper``, which gets the original as its first argument."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def _with_last_losses(original: Callable[..., None], self: Any, target: Any) -> None:
    """Sets the losses that the first pipeline stage would receive from the last one."""
    original(self, target)
    self.last = dict.fromkeys(("loss", *target.weights), 1.0)


def _without_context_parallelism(
    original: Callable[..., None], self: Any, config: Any, *args: Any, **kwargs: Any
) -> None:
    """Each rank attends to its own shard of the sequence."""
    context, config.context_parallel_size = config.context_parallel_size, 1
    original(self, config, *args, **kwargs)
    config.context_parallel_size = context


def _with_tensor_type(original: Callable[..., None], self: Any, arg: object) -> None:
    """Makes fake tensors count as tensors where Megatron compares types."""
    original(self, arg)
    if isinstance(arg, Tensor):
        self.type = Tensor


def _with_graph_safe_rng(
    original: Callable[..., None], use_te_rng_tracker: bool = False, *args: Any, **kwargs: Any
) -> None:
    """Marks random numbers as capturable if TransformerEngine's are requested."""
    original(use_te_rng_tracker, *args, **kwargs)
    if use_te_rng_tracker:
        random._CUDA_RNG_STATE_TRACKER.is_inference_rng_tracker = True


def _load_causal_lm(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def _with_equal_experts(
    original: Callable[..., Tensor], self: Any, routing_map: Tensor
) -> np.ndarray:
    """Returns tokens per local expert, and sets the splits between ranks, as on the host."""
    original(self, routing_map)
    tokens_each, remainder = divmod(self.num_out_tokens, self.num_experts)
    tokens = tokens_each + (np.arange(self.num_experts) < remainder)
    local: np.ndarray = tokens[self.local_expert_indices]
    ranks = self.tp_size * self.ep_size
    if ranks > 1:
        self.input_splits = tokens.reshape(self.ep_size, -1).sum(axis=1)
        self.output_splits = np.full(self.ep_size, local.sum())
        self.output_splits_tp = np.full(self.tp_size, self.ep_size * local.sum())
    self.num_global_tokens_per_local_expert = np.tile(local, (ranks, 1))
    local *= ranks
    return local


def _permute(
    tokens: Tensor, routing_map: Tensor, probs: Tensor, num_out_tokens: int, **settings: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a row per token and expert, its probability, and the index of its token.

    Megatron's own takes the number of rows from the values of the mask.
    """
    indices = routing_map.new_empty(num_out_tokens, dtype=torch.int64)
    row_probs = probs.T.contiguous().flatten().index_select(0, indices)
    return tokens.index_select(0, indices), row_probs, indices
