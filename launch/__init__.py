"""The launcher: composes, plans, and starts stages somewhere."""
