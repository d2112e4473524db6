"""Runs the code of stages on tensors with full shapes but no values, on a machine without a GPU."""
