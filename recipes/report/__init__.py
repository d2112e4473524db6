"""Report pages, plots, model cards, gates, and comparisons of runs."""
