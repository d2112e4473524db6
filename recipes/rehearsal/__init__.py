"""Runs stages' own code at full size on a machine without a GPU, on tensors without values."""
