"""Conversion between Hugging Face and NeMo, and the CPU backend."""
