"""Converts models between Hugging Face, NeMo and GGUF."""
