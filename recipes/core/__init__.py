"""Errors, files, manifests and fingerprints; the process that runs a stage."""
