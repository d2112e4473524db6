"""Reads documents from text sources, tokenizes them, and reads training sequences of tokens."""
