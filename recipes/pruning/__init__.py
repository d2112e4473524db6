"""Importance of a model's parts, and their pruning."""
