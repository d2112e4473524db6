"""Builds, checks, quantises, times and serves engines."""
