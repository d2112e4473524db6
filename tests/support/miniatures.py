"""What makes a large recipe a small one: budgets and layout, whatever its model."""

from __future__ import annotations

DISTILL = {
    "max_steps": 4,
    "warmup_steps": 1,
    "global_batch_size": 4,
    "tensor_model_parallel_size": 1,
    "resources.nodes": 1,
    "resources.devices": 1,
    "val_check_interval": 4,
    "limit_val_batches": 2,
    "checkpoint_interval": 4,
}
