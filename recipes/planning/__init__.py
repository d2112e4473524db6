"""Checks a run's settings and estimates its memory, time and cost before it starts. Torch-free."""
