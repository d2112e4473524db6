"""Pruning and distillation of language models, in rooms by capability.

The rule of layers: a room imports only from rooms below it, rooms on one line do not import each
other, no stage imports another, and no files import each other in a circle.

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
