"""Pruning and distillation of language models, a package for each capability.

A package imports only from packages below it. Packages on one line do not import each other. No
stage imports another. There are no import cycles.

    launch, benchmarks
    rehearsal
    stages
    report
    search
    pruning, distillation, engines
    evaluation
    planning
    nemo_convert, data
    backend
    core

``make lint`` enforces it (``tool.importlinter`` in pyproject.toml).
"""
