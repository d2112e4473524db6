"""Pruning and distillation of language models, with one package for each capability.

A package imports only from packages that are lower in this list. Packages on one line do not import
each other. No stage imports another stage. There are no import cycles.

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

``make lint`` enforces these rules (``tool.importlinter`` in pyproject.toml).
"""
