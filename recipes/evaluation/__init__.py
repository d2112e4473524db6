"""Quality of models: on text against a teacher, and on benchmarks."""
