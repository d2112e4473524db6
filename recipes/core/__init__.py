"""Code that all stages share: settings, errors, files, manifests, fingerprints and processes."""
