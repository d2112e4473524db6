"""Runs NeMo, Megatron-Core and ModelOpt on this machine's device, CUDA or CPU."""

SPEED_PATCH_NAMES = (
    "unshared_gradients",
    "attention_backward",
    "single_rank_gather",
    "shared_optimizer_state",
    "released_buckets",
)
"""Names of the patch sets in ``cpu_speed``, here because settings are read without torch."""
