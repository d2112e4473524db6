"""Importance scores of layers, channels, heads and experts; pruning; reconstruction."""
