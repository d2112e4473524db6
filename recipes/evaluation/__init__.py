"""Measures the quality of models: on text, compared with a teacher, and on benchmarks."""
