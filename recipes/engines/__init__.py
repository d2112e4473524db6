"""Engines: building, checking, quantising and timing them."""
