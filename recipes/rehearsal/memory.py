"""Measures the peak memory of tensors: by label on the fake device, and in total on the host."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.backend.patches import Patch, apply, replace_with, wrap
from recipes.evaluation import predictions
from recipes.rehearsal.fake_cuda import DEVICE

TEMPORARY = ("activations", "logits")
"""Default labels, which a tensor keeps if it gets no other label."""
PARENT = "parent"
"""Label of the memory of a search, the parent process of a training run on the same GPU."""
BLOCK = 512
"""CUDA's allocator rounds sizes up to a multiple of this many bytes (``kMinBlockSize``)."""
TEACHER_MODULE = "_teacher_model."
"""Part of the names that ModelOpt gives to the teacher's weights."""


@dataclass
class _Allocation:
    """A storage on the device that has not been freed."""

    size: int
    """Bytes, rounded up to a multiple of ``BLOCK``."""
    label: str


class MemoryTracker(TorchDispatchMode):
    """Counts the memory that operations have allocated and that is not freed yet.

    Each tensor on the device has a label, which ``label`` or ``labeled`` sets. The default label is
    "logits" if the size of the last dimension is ``vocabulary``, otherwise "activations".

    Args:
        vocabulary: Size of the rank's shard of the vocabulary.

    Attributes:
        now: Bytes on the device by label.
        peak: Value of ``now`` when its sum was largest.
        host_peak: Largest number of bytes in host memory.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._label: str | None = None  # label of new tensors in a block of ``labeled``
        self._live: dict[int, _Allocation] = {}  # by address of the storage, on the device
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        # ``_total`` is the sum of ``now``. ``_reserved`` also includes freed memory that CUDA's
        # allocator would cache.
        self._total = self._highest_total = self._reserved = 0
        self._host: dict[int, int] = {}  # bytes by address of the storage, in host memory
        self._host_total = self.host_peak = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, Tensor) and tensor.device == DEVICE:
                self._add(tensor)
            elif isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._add_on_host(tensor)
        return result

    def _add_on_host(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._host:
            return
        self._host[key] = storage.nbytes()
        self._host_total += storage.nbytes()
        self.host_peak = max(self.host_peak, self._host_total)
        weakref.finalize(storage, self._remove_from_host, key)

    def _remove_from_host(self, key: int) -> None:
        self._host_total -= self._host.pop(key)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = math.ceil(storage.nbytes() / BLOCK) * BLOCK
        has_vocabulary = tensor.dim() > 0 and tensor.shape[-1] == self._vocabulary
        label = self._label or ("logits" if has_vocabulary else "activations")
        self._live[key] = _Allocation(size, label)
        weakref.finalize(storage, self._remove, key)
        self._change_total(label, size)

    def _remove(self, key: int) -> None:
        allocation = self._live.pop(key)
        self._change_total(allocation.label, -allocation.size)

    def _change_total(self, label: str, change: int) -> None:
        """Adds bytes, which are negative for freed memory, and updates the peak."""
        self.now[label] += change
        self._total += change
        self._reserved = max(self._reserved, self._total)
        if self._total > self._highest_total:
            self.reset_peak()

    def label(self, label: str, tensors: Iterable[Tensor]) -> None:
        """Labels live tensors that still have a default label."""
        for tensor in tensors:
            allocation = self._live.get(tensor.untyped_storage()._cdata)
            if allocation is not None and allocation.label in TEMPORARY:
                self.now[allocation.label] -= allocation.size
                self.now[label] += allocation.size
                allocation.label = label

    @contextmanager
    def labeled(self, label: str) -> Iterator[None]:
        """Labels all tensors that are allocated in a ``with`` block."""
        self._label = label
        yield
        self._label = None

    def release_cache(self) -> None:
        """Stops counting freed memory as reserved; replaces ``torch.cuda.empty_cache``."""
        self._reserved = self._total

    def label_as_parent(self) -> None:
        """Labels all memory, live or cached, as that of a search that now starts a training run."""
        for allocation in self._live.values():
            allocation.label = PARENT
        self.now = Counter({PARENT: self._total})
        self._change_total(PARENT, self._reserved - self._total)  # adds the cached memory
        self.reset_peak()

    def reset_peak(self) -> None:
        """Sets the peak to the present memory, even if the earlier peak is higher."""
        self._highest_total, self.peak = self._total, self.now.copy()


def install_labels(memory: MemoryTracker) -> None:
    """Installs hooks that label weights, gradients and optimizer states at their first use."""
    # Not a set of ids, because a new module may get the id of a freed module.
    seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    has_stepped = False

    def before_forward(module: nn.Module, args: object) -> None:
        if module not in seen:
            seen.add(module)
            _label_weights(memory, module)

    def after_step(optimizer: Optimizer, *args: object) -> None:
        nonlocal has_stepped
        _label_states(memory, optimizer)
        if not has_stepped:
            # The optimizer has allocated these states in its first step without their label. So
            # the peak is measured in later steps.
            memory.reset_peak()
        has_stepped = True

    def load_and_label(load: Any, optimizer: Optimizer, state: Any) -> None:
        load(optimizer, state)
        _label_states(memory, optimizer)

    release = replace_with(memory.release_cache)
    target, reason = "torch.optim.optimizer:Optimizer.load_state_dict", "loaded states need a label"
    apply([Patch(target, reason, "7f8aa58e98c5", wrap(load_and_label))])
    # No fingerprint: the original is from ``fake_cuda``, which checked PyTorch's function.
    apply([Patch("torch.cuda:empty_cache", "cached memory is counted", "", release)])
    head = replace_with(_labeling_head(memory, predictions.float32_head))
    # ``scoring`` imports the function by name, so its own reference is patched, too.
    for module in ("recipes.evaluation.predictions", "recipes.pruning.scoring"):
        apply([Patch(f"{module}:float32_head", "the head's weight gets a label", "", head)])
    nn.modules.module.register_module_forward_pre_hook(before_forward)
    register_optimizer_step_post_hook(after_step)


def _labeling_head(
    memory: MemoryTracker, original: Callable[[Tensor], Any]
) -> Callable[[Tensor], Any]:
    """Returns a ``float32_head`` that labels the output head's weight and the float32 copy.

    Module hooks do not see this weight: evaluations multiply by it outside of any module.
    """

    def float32_head(weight: Tensor) -> Any:
        memory.label("weights", [weight])
        with memory.labeled("weights"):
            return original(weight)

    return float32_head


def _label_states(memory: MemoryTracker, optimizer: Optimizer) -> None:
    """Labels an optimizer's states and main weights."""
    main_weights = (weight for group in optimizer.param_groups for weight in group["params"])
    for main_weight in main_weights:
        states = optimizer.state.get(main_weight, {}).values()  # indexing would create an entry
        memory.label("optimizer", (state for state in states if isinstance(state, Tensor)))
        # With precision 32, a main weight is a view of the model's weight and takes no memory.
        if not main_weight._is_view():
            memory.label("optimizer", [main_weight])


def _label_weights(memory: MemoryTracker, module: nn.Module) -> None:
    """Labels the weights of a module, and the gradients of Megatron's data-parallel wrapper."""
    for name, weight in module.named_parameters():
        memory.label("teacher" if TEACHER_MODULE in name else "weights", [weight])
    if isinstance(module, DistributedDataParallel):
        for buffer in (*module.buffers, *module.expert_parallel_buffers):
            memory.label("gradients", [buffer.grad_data])
