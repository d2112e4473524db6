"""Sizes of buffers that stages allocate and the planner counts, said once for both."""

from __future__ import annotations

LOSS_CHUNK_BYTES = 512 << 20
"""A float32 buffer of the loss on a GPU: enough to fill it."""
LOGITS_BYTES = 128 << 20
"""Float32 logits of a model that exist at once, where models are only read."""
