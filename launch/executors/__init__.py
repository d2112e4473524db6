"""Ways of starting a stage, one module each."""
