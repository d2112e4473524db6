"""Patches that let Megatron-Core, NeMo and ModelOpt run without CUDA.

A machine without CUDA needs the patches of this module. A machine without TransformerEngine needs
the patches of ``local_layers``. Patches that only make a CPU faster are in ``cpu_speed``.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch

from recipes.backend.adamw import clip_by_total_norm
from recipes.backend.device import FakeStream, device
from recipes.backend.local_layers import WITHOUT_TRANSFORMER_ENGINE, needs_local_layers
from recipes.backend.patches import Patch, applied, apply, constant, patches, replace_with, wrap

CPU = torch.device("cpu")
_enabled: set[str] = set()
"""Keys of ``REQUIRED`` whose patches have been applied in this process."""


def enable(*groups: str) -> None:
    """Applies the patches that this machine needs, once, for the rest of this process.

    ``groups`` are keys of ``REQUIRED``, by default all of them. Raises errors as ``apply`` does.
    """
    for group in groups or REQUIRED:
        if group in _enabled:
            continue
        is_needed = needs_local_layers() if group == "layers" else device() == "cpu"
        if is_needed:
            apply(REQUIRED[group])
            _enabled.add(group)
            if group == "torch":
                limit_other_threads()


def limit_other_threads() -> None:
    """Lets this thread compute on all cores, and every thread that starts later on one core.

    gloo's threads copy the tensors that they send. If each of them had OpenMP helpers, there would
    be more threads than cores. OpenMP would then put all threads to sleep between operations, and a
    step of distillation would take a quarter longer.

    This is not one of ``cpu_speed_patches``, because PyTorch cannot reverse it. It does not change
    results.
    """
    # PyTorch's getter also fixes how many OpenMP threads this thread uses. After that,
    # set_num_threads(1) in another thread affects only that thread and later ones.
    torch.get_num_threads()
    setter = threading.Thread(target=torch.set_num_threads, args=(1,))
    setter.start()
    setter.join()


# ``_stay`` is a replacement. Functions whose only parameter is ``original`` return a replacement.
# Functions with ``original`` and further parameters are passed to ``wrap``.
def _stay(self: Any, *args: object, **kwargs: object) -> Any:
    """Replaces ``cuda()`` of tensors and modules: leaves them on the CPU."""
    return self


def _create_on_cpu(original: Any) -> Any:
    """Replaces ``device="cuda"`` by the CPU in a function that creates tensors."""

    def create(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # pinned memory needs the CUDA driver
        return original(*args, **kwargs)

    return create


def _move_to_cpu(original: Any) -> Any:
    """Redirects ``Tensor.to("cuda")`` to the CPU."""

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], (str, torch.device)) and str(args[0]).startswith("cuda"):
            args = (CPU, *args[1:])
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        moved: torch.Tensor = original(self, *args, **kwargs)
        return moved

    return to


def _gather_scalar(original: Any) -> Any:
    """Reshapes a 0-dimensional input to one dimension, as NCCL does and gloo does not."""

    # cpu_speed patches the result again, as Megatron's dist_all_gather_func, and checks the hash of
    # its source. Because of functools.wraps, inspect returns the original's source.
    @functools.wraps(original)
    def all_gather_into_tensor(output: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return original(output, tensor.reshape(1) if tensor.dim() == 0 else tensor, *args, **kwargs)

    return all_gather_into_tensor


def _seed_all(original: Any) -> Any:
    """Seeds Megatron's generators, too, which NeMo seeds only if there is a GPU."""

    def _set_random_seed(seed: int, *args: Any, **kwargs: Any) -> None:
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        original(seed, *args, **kwargs)
        model_parallel_cuda_manual_seed(seed)

    return _set_random_seed


def _name_cuda_types(original: Any) -> Any:
    """Makes ``Tensor.type()`` return CUDA names while Megatron compares these names."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        with applied([CUDA_NAMES]):
            original(self, *args, **kwargs)

    return __init__


def _array_from_cpu(
    original: Any, tensor: Any, as_numpy: bool = False, record_stream: bool = False
) -> Any:
    """Converts a CPU tensor to an array if ``as_numpy``, as the original does for a GPU tensor.

    Megatron passes the arrays to collectives as split sizes.
    """
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _allocate_shard_on_cpu(original: Any, self: Any, device: Any, *args: Any) -> None:
    """Allocates a shard of a checkpoint on the CPU instead of a GPU."""
    original(self, CPU if device == "cuda" else device, *args)


CUDA_NAMES = Patch(
    "torch:Tensor.type",
    "Megatron compares the names of types",
    "49d1168ec63d",
    # For example, "torch.FloatTensor" becomes "torch.cuda.FloatTensor".
    wrap(lambda original, tensor: original(tensor).replace("torch.", "torch.cuda.", 1)),
)

REQUIRED: dict[str, tuple[Patch, ...]] = {
    "torch": (
        *patches(
            "torch.cuda:",
            ("current_device", "Megatron allocates tensors on it", "6e9804168a5c", constant(CPU)),
            ("empty_cache", "called after a model is loaded", "bce971e6854f", constant(None)),
            ("synchronize", "called by the checkpoint writer", "7055e6143ffe", constant(None)),
            ("max_memory_reserved", "logged by NeMo each step", "60af9cdf5dca", constant(0)),
            ("max_memory_allocated", "logged by NeMo each step", "7d74e1261dc1", constant(0)),
            (
                "get_rng_state",
                "checkpoints hold the random state",
                "1190f97901d7",
                replace_with(lambda device=None: torch.get_rng_state()),
            ),
            (
                "set_rng_state",
                "checkpoints restore the random state",
                "2aaed350f20b",
                replace_with(lambda state, device=None: torch.set_rng_state(state)),
            ),
            ("manual_seed", "seeds the device", "a71497712eba", replace_with(torch.manual_seed)),
            ("Stream", "DDP and checkpoint streams", "f5b9547b4660", replace_with(FakeStream)),
            ("Event", "pipeline schedule", "cc34c59c482f", replace_with(FakeStream)),
            ("stream", "DDP communicates on a stream", "a701c622b6f5", constant(FakeStream())),
            ("current_stream", "DDP waits for it", "ca5387f64ee1", constant(FakeStream())),
            ("default_stream", "DDP waits for it", "b0a2135268c6", constant(FakeStream())),
        ),
        *patches(
            "torch:",
            ("Tensor.cuda", "Megatron moves results", "554cb3ab866a", replace_with(_stay)),
            ("nn.Module.cuda", "NeMo moves the model", "a3f558ba5849", replace_with(_stay)),
            ("Tensor.to", "literal 'cuda' in NeMo's metric logging", "6f7a670dec75", _move_to_cpu),
            *(
                (name, "literal device='cuda' in Megatron and NeMo", fingerprint, _create_on_cpu)
                for name, fingerprint in (
                    ("tensor", "44379d32e654"),
                    ("zeros", "94f562353cd6"),
                    ("ones", "572ac599804b"),
                    ("empty", "37c4ae8c7ad9"),
                    ("empty_like", "1d384eb0e768"),
                    ("full", "cddb34bafcba"),
                    ("arange", "23ed02e3959e"),
                )
            ),
        ),
        Patch(
            "torch.distributed:all_gather_into_tensor",
            "gloo refuses a 0-dimensional input (ModelOpt's layer count)",
            "f6341959287e",
            _gather_scalar,
        ),
    ),
    "megatron": patches(
        "megatron.core.",
        (
            "tensor_parallel.random:_get_cuda_rng_state",
            "CudaRNGStatesTracker reads a GPU's generator",
            "aa26caaa069c",
            replace_with(
                lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
            ),
        ),
        (
            "tensor_parallel.random:_set_cuda_rng_state",
            "CudaRNGStatesTracker sets a GPU's generator",
            "b179c9d95438",
            replace_with(
                lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
            ),
        ),
        (
            "optimizer.optimizer:clip_grad_by_total_norm_fp32",
            "accepts torch.cuda.FloatTensor only",
            "8edb9da53650",
            clip_by_total_norm,
        ),
        (
            "optimizer.distrib_optimizer:DistributedOptimizer.__init__",
            "accepts only parameters whose type is named torch.cuda.*",
            "3275f640fc1b",
            _name_cuda_types,
        ),
        (
            "transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
            "returns arrays only from a GPU; collectives do not accept tensors as split sizes",
            "03806fe3e9bb",
            wrap(_array_from_cpu),
        ),
        (
            "dist_checkpointing.mapping:ShardedTensor.init_data",
            "allocates on a GPU what other ranks read from a checkpoint",
            "b12fc9618527",
            wrap(_allocate_shard_on_cpu),
        ),
    ),
    "nemo": patches(
        "nemo.lightning.",
        (
            "io.pl:_fix_tensors_device",
            "asks CUDA for the current device when loading",
            "561d518d996e",
            replace_with(lambda checkpoint: checkpoint),
        ),
        (
            "megatron_init:_set_random_seed",
            "seeds Megatron's generators only if there is a GPU",
            "431f155d7863",
            _seed_all,
        ),
    ),
    "layers": WITHOUT_TRANSFORMER_ENGINE,
}
"""Patches by group. A machine without CUDA needs all groups. A machine with CUDA, but without
TransformerEngine, needs only ``layers``."""
