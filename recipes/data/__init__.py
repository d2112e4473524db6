"""Text: documents from any source, and fixed sequences of tokens."""
