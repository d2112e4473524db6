"""Benchmarks of this repository; see README.md in this folder."""
