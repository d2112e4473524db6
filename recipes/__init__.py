"""The stages, one module each, and the logic they share."""
