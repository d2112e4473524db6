"""Megatron-Core, NeMo and ModelOpt without CUDA or TransformerEngine: every change, and why.

``enable()`` applies the patches listed here where what they stand for is missing, and fails loudly
if one of the replaced names is gone, so an upgrade cannot leave a patch that silently no longer
works. ``adapt_config`` sets what a model's config must be without TransformerEngine, in memory
only: what is written to a checkpoint stays what a GPU wants.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from nemo_convert import cpu_products, cpu_training
from nemo_convert.device import device, own_layers
from recipes.core.errors import RecipeError
from recipes.core.one_pass import fusable

CPU = torch.device("cpu")
GROUPS = ("torch", "megatron", "nemo", "layers", "modelopt")
FUSIONS = (
    "apply_rope_fusion",
    "masked_softmax_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "gradient_accumulation_fusion",
    "persist_layer_norm",
    "cross_entropy_loss_fusion",
    "moe_grouped_gemm",
    "moe_permute_fusion",
)
_applied: set[str] = set()


@dataclass(frozen=True)
class Patch:
    """One replaced attribute. ``make`` receives the original and returns the replacement."""

    target: str
    """``module:attribute`` or ``module:Class.attribute``."""
    reason: str
    make: Callable[[Any], Any]


def enable(*groups: str) -> None:
    """Applies those patches of ``groups`` (of all by default) that this machine needs, once."""
    for group in groups or GROUPS:
        if group in _applied or not (own_layers() if group == "layers" else device() == "cpu"):
            continue
        for patch in PATCHES[group]:
            _apply(patch)
        _applied.add(group)
        if group == "torch":
            compute_in_this_thread()
        if group == "modelopt":
            register_rms_norm()


def compute_in_this_thread() -> None:
    """Leaves the cores to this thread: those that begin later compute with one each.

    Where gloo's threads copy what they send, OpenMP would give each of them helpers, too. With more
    of these than cores it lets all of them sleep between any two operations, and waking them
    takes as long as a small operation: steps of distillation took a quarter longer.
    """
    torch.get_num_threads()  # this thread has its own number from here on
    other = threading.Thread(target=torch.set_num_threads, args=(1,))
    other.start()
    other.join()


def _apply(patch: Patch) -> None:
    module, _, path = patch.target.partition(":")
    *parents, name = path.split(".")
    holder: Any = importlib.import_module(module)
    try:
        for parent in parents:
            holder = getattr(holder, parent)
        original = getattr(holder, name)
    except AttributeError as error:
        raise RecipeError(
            f"CPU backend: {patch.target} does not exist in the installed version.",
            "install the pinned versions (pip install -e .), or update nemo_convert/cpu_backend.py",
        ) from error
    setattr(holder, name, patch.make(original))


def _always(value: Any) -> Callable[[Any], Any]:
    """A patch that returns ``value`` whatever it is called with."""
    return lambda original: lambda *args, **kwargs: value


class _Stream:
    """Stands in for CUDA streams and events: a CPU runs in order, and has nothing to wait for."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, *args: object) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, *args: object) -> None: ...

    def record_event(self, *args: object) -> _Stream:
        return self

    def wait(self, *args: object) -> None: ...


def _on_cpu(factory: Any) -> Any:
    """Redirects ``device="cuda"`` literals and drops ``pin_memory``, which needs a driver."""

    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _tensor_to(original: Any) -> Any:
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], (str, torch.device)) and str(args[0]).startswith("cuda"):
            args = (CPU, *args[1:])
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        result: torch.Tensor = original(self, *args, **kwargs)
        return result

    return to


def _without_fusion_checks(original: Any) -> Any:
    """Lets a config say what a GPU wants; ``adapt_config`` turns it off before building."""

    def __post_init__(self: Any) -> None:  # noqa: N807
        fusions = ("apply_rope_fusion", "moe_permute_fusion")
        wanted = {name: getattr(self, name) for name in fusions}
        vars(self).update(dict.fromkeys(fusions, False))
        original(self)
        vars(self).update(wanted)

    return __post_init__


def _router_logits(original: object) -> Any:
    def gate(x: Any, weight: Any, bias: Any, dtype: torch.dtype) -> torch.Tensor:
        bias = None if bias is None else bias.to(dtype)
        return nn.functional.linear(x.to(dtype), weight.to(dtype), bias)

    return gate


def _gather_scalar(original: Any) -> Any:
    def all_gather_into_tensor(output: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return original(output, tensor.reshape(1) if tensor.dim() == 0 else tensor, *args, **kwargs)

    return all_gather_into_tensor


def _seed_all(original: Any) -> Any:
    def set_random_seed(seed: int, *args: Any, **kwargs: Any) -> None:
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        original(seed, *args, **kwargs)
        model_parallel_cuda_manual_seed(seed)

    return set_random_seed


PATCHES: dict[str, list[Patch]] = {
    "torch": [
        Patch("torch.cuda:current_device", "Megatron allocates on it", _always(CPU)),
        Patch("torch.cuda:empty_cache", "called after loading", _always(None)),
        Patch("torch.cuda:synchronize", "called by the checkpoint writer", _always(None)),
        Patch("torch.cuda:max_memory_reserved", "logged by NeMo each step", _always(0)),
        Patch("torch.cuda:max_memory_allocated", "logged by NeMo each step", _always(0)),
        Patch(
            "torch.cuda:get_rng_state",
            "random state is saved in checkpoints",
            lambda _: lambda device=None: torch.get_rng_state(),
        ),
        Patch(
            "torch.cuda:set_rng_state",
            "random state is restored from checkpoints",
            lambda _: lambda state, device=None: torch.set_rng_state(state),
        ),
        Patch("torch.cuda:manual_seed", "seeds the device", lambda _: torch.manual_seed),
        Patch("torch.cuda:Stream", "DDP and checkpoint streams", lambda _: _Stream),
        Patch("torch.cuda:Event", "pipeline schedule", lambda _: _Stream),
        Patch(
            "torch.cuda:stream",
            "DDP communicates on one",
            lambda _: lambda stream: contextlib.nullcontext(),
        ),
        Patch("torch.cuda:current_stream", "DDP waits for it", _always(_Stream())),
        Patch("torch.cuda:default_stream", "DDP waits for it", _always(_Stream())),
        Patch("torch:Tensor.cuda", "Megatron moves results", lambda _: lambda self, *a, **k: self),
        Patch("torch:nn.Module.cuda", "NeMo moves the model", lambda _: lambda self, *a, **k: self),
        Patch("torch:Tensor.to", "literal 'cuda' in NeMo's metric logging", _tensor_to),
        *(
            Patch(f"torch:{name}", "literal device='cuda' in Megatron and NeMo", _on_cpu)
            for name in ("tensor", "zeros", "ones", "empty", "empty_like", "full", "arange")
        ),
        Patch(
            "torch.distributed:all_gather_into_tensor",
            "gloo refuses a 0-dimensional input (ModelOpt's layer count)",
            _gather_scalar,
        ),
    ],
    "megatron": [
        Patch(
            "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
            "the tracker reads a device generator",
            lambda _: lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
        ),
        Patch(
            "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
            "the tracker writes a device generator",
            lambda _: lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state),
        ),
        Patch(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.get_parameter_state_dp_zero",
            "copies the state three times for a checkpoint",
            cpu_training.state_in_place,
        ),
        Patch(
            "megatron.core.dist_checkpointing.strategies.async_utils:TemporalAsyncCaller.schedule_async_call",
            "keeps copies of weights while another process writes them",
            cpu_training.with_its_writer,
        ),
        *(
            Patch(
                f"megatron.core.distributed.param_and_grad_buffer:dist_{name}_func",
                "gloo copies for a group of one what is there already",
                cpu_training.among_several,
            )
            for name in ("all_gather", "reduce_scatter")
        ),
        Patch(
            "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer.reset",
            "writes zeros, over which gradients are written",
            _always(None),
        ),
        *(
            Patch(
                f"megatron.core.distributed.param_and_grad_buffer:{name}",
                "gradients stand in one buffer, a tenth of a distillation's memory, all the time",
                make,
            )
            for name, make in (
                ("_ParamAndGradBuffer.__init__", cpu_training.of_its_own),
                ("_ParamAndGradBuffer.scale_gradients", cpu_training.scale_each),
                ("shard_buffer", cpu_training.in_shards),
            )
        ),
        *(
            Patch(
                f"megatron.core.distributed:DistributedDataParallel.{name}",
                "adds bfloat16 gradients to float32 zeros, which is 5% of a step of distillation",
                make,
            )
            for name, make in (
                ("zero_grad_buffer", cpu_training.begin_gradients),
                ("_make_backward_post_hook", cpu_training.write_first_gradient),
                ("finish_grad_sync", cpu_training.end_gradients),
            )
        ),
        *(
            Patch(
                f"megatron.core.tensor_parallel.layers:linear_with_{name}",
                "oneDNN leaves threads idle in some products, 6% of a step of distillation",
                cpu_products.alone,
            )
            for name in ("grad_accumulation_and_async_allreduce", "frozen_weight")
        ),
        Patch(
            "megatron.core.tensor_parallel.layers:VocabParallelEmbedding.forward",
            "its gradient is as large as the vocabulary, 1% of a step of distillation",
            cpu_training.few_rows,
        ),
        Patch(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._copy_model_grads_to_main_grads",
            "makes them float32 in a pass of its own, and keeps both until the next step",
            cpu_training.handed_on,
        ),
        Patch(
            "megatron.core.optimizer.clip_grads:l2_norm_impl",
            "knows no gradients that are still to be scaled",
            cpu_training.norm_of_all,
        ),
        Patch(
            "megatron.core.optimizer.optimizer:clip_grad_by_total_norm_fp32",
            "asserts torch.cuda.FloatTensor, and is a pass over all gradients",
            cpu_training.clip_by_norm,
        ),
        Patch(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.__init__",
            "accepts only parameters whose type is named torch.cuda.*",
            cpu_training.with_cuda_type_names,
        ),
    ],
    "nemo": [
        Patch(
            "nemo.lightning.io.pl:_fix_tensors_device",
            "asks CUDA for the current device when loading",
            lambda _: lambda checkpoint: checkpoint,
        ),
        Patch(
            "nemo.lightning.megatron_init:_set_random_seed",
            "seeds Megatron's generators only where a GPU is counted",
            _seed_all,
        ),
    ],
    "layers": [
        Patch(
            "megatron.core.transformer.transformer_config:TransformerConfig.__post_init__",
            "refuses fusions without TransformerEngine",
            _without_fusion_checks,
        ),
        Patch(
            "megatron.core.transformer.moe.router:router_gating_linear",
            "asks for a name that only TransformerEngine defines",
            _router_logits,
        ),
        Patch("torch.optim:AdamW", "Megatron asks for the unfused step", cpu_training.fused),
        Patch(
            "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd",
            "the fused one is TransformerEngine's",
            fusable,
        ),
        *(
            Patch(
                f"megatron.core.optimizer.distrib_optimizer:{name}",
                "the optimizer's state is as TransformerEngine's",
                lambda _: True,
            )
            for name in ("HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER")
        ),
    ],
    "modelopt": [],
}


def register_rms_norm() -> None:
    """Lets ModelOpt see ``nn.RMSNorm``, which Megatron's local layer spec uses, on any device."""
    from modelopt.torch.nas.modules.norm import _DynamicLayerNorm
    from modelopt.torch.nas.registry import DMRegistry

    if nn.RMSNorm in DMRegistry:
        return

    class _DynamicRMSNorm(_DynamicLayerNorm):
        def _setup(self, *, num_features: Any) -> None:
            self._register_hparam("num_features", num_features)
            self._register_dynamic_attribute("weight", self._cut_to_active_features)
            self._register_dynamic_attribute("normalized_shape", self._get_normalized_shape)

    DMRegistry.register({nn.RMSNorm: "nn.RMSNorm"})(_DynamicRMSNorm)


def adapt_config(config: Any, training: bool = False) -> Any:
    """Makes a NeMo model config buildable without TransformerEngine, in place; returns it.

    TransformerEngine's layer spec and the fused kernels need CUDA and it. The local spec has the
    same checkpoint keys, so a checkpoint moves freely between the two. ``training`` uses the layers
    of ``cpu_layers``, which ModelOpt cannot prune.
    """
    if own_layers():
        use_local_layers(config)
        if training:
            config.transformer_layer_spec = training_block_spec
        config.use_te_activation_func = training  # means: the activation is a module of the spec
        config.use_cpu_initialization = device() == "cpu"
    return config


def use_local_layers(config: Any) -> None:
    """Makes a model of Megatron's own layers, on any device, for what must see inside of them."""
    config.transformer_layer_spec = sdpa_layer_spec
    for fusion in FUSIONS:
        setattr(config, fusion, False)


def training_block_spec(config: Any) -> Any:
    """Megatron's local layer spec with the layers of ``cpu_layers``, for a Llama-like model."""
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    from nemo_convert.cpu_layers import CausalAttention, RMSNorm, SwiGLU

    spec = _local_layer_spec(config)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = CausalAttention
    _feed_forward(spec, config).activation_func = SwiGLU
    layers = [spec] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def sdpa_layer_spec(config: Any) -> Any:
    """Megatron's local layer spec with PyTorch's fused attention instead of the unfused one."""
    spec = _local_layer_spec(config)
    spec.submodules.self_attention.submodules.core_attention = _sdpa_attention()
    return spec


def fuse_attention(core: nn.Module) -> None:
    """Gives a model that ModelOpt has converted its fused attention back.

    ModelOpt makes Megatron's own of it, which holds every score of every head.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    forward = _sdpa_attention().forward
    for module in core.modules():
        if isinstance(module, DotProductAttention):
            module.forward = MethodType(forward, module)


def _local_layer_spec(config: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        normalization=config.normalization,
        qk_layernorm=config.qk_layernorm,
    )
    if config.num_moe_experts:
        # TransformerEngine's spec has this norm by itself before experts, so a checkpoint must.
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return spec


def _feed_forward(spec: Any, config: Any) -> Any:
    """Submodules of a layer's feed-forward part, or of each of its experts."""
    mlp = spec.submodules.mlp.submodules
    return mlp.experts.submodules if config.num_moe_experts else mlp


def _sdpa_attention() -> type[nn.Module]:
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from nemo_convert.cpu_layers import sdpa

    class SdpaAttention(DotProductAttention):  # type: ignore[misc]
        """Causal attention by ``scaled_dot_product_attention``; subclasses what ModelOpt knows."""

        def forward(
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            *args: object,
            **kwargs: object,
        ) -> torch.Tensor:
            """Returns [s, b, heads·d] for query [s, b, heads, d], key and value [s, b, groups, d].

            ``attention_mask`` is not read: every batch here is causal and unpadded.
            """
            return sdpa(query, key, value, self.softmax_scale)

    return SdpaAttention
