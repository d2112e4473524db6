"""Finds the best shape within a budget: lists, times, ranks and trains candidates."""
