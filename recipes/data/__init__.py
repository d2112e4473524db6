"""Text: documents from any source, and fixed windows of tokens."""
