"""Scores the importance of layers, channels, heads and experts; prunes; reconstructs weights."""
