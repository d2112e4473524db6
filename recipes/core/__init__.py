"""Errors, files, manifests, fingerprints, and the process of a stage."""
