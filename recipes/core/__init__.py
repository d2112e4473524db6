"""What every room stands on: errors, files, manifests, fingerprints, a stage's worker."""
