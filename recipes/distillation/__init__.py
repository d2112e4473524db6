"""Trains a student on its teacher's outputs, with NeMo's trainer."""
