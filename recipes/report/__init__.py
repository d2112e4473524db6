"""What people read: pages, plots, model cards, gates, comparisons of runs."""
