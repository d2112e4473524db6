"""Shapes within a budget: listed, ranked, timed, and trained against each other."""
