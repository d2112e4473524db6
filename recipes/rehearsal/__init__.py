"""Stages run at full size on a machine without a GPU: their own code, weightless tensors."""
