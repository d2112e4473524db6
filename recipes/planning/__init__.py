"""Checks and estimates before anything runs, without torch: rules, memory, time, money."""
