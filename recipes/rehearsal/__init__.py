"""Rehearses stages: runs their code on fake tensors (shapes without values) and without a GPU."""
