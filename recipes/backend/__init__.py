"""Runs NeMo, Megatron-Core and ModelOpt on the device that this machine has, CUDA or CPU."""

SPEED_PATCH_NAMES = (
    "unshared_gradients",
    "attention_backward",
    "single_rank_gather",
    "shared_optimizer_state",
    "released_buckets",
)
"""Sets of patches in ``cpu_speed``, named here for settings, which must not import torch."""
