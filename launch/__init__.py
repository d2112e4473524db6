"""The launcher: composes and plans runs; starts stages locally, in containers or on Slurm."""
