"""Speculative decoding: the student drafts for its teacher, beside the teacher alone. Torch-free.

The teacher reads all tokens of a draft in one step and keeps those that it would have written
itself (greedily here; arXiv:2211.17192), so that only the time is another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from recipes.core.errors import RecipeError
from recipes.core.metrics import MetricsLog
from recipes.core.stage import Input
from recipes.data.results import DatasetResult
from recipes.engines.bench import Contender, Worker
from recipes.engines.results import Speculation
from recipes.engines.settings import MeasureSpeedConfig
from recipes.engines.timing import Generation, random_prompts, spread
from recipes.planning.roofline import RequestShape


def windows_of(cfg: MeasureSpeedConfig, data: Input | None, vocabulary: int) -> list[list[int]]:
    """What drafts are tried on: one that warms up, and one for each repetition at least."""
    count, length = cfg.repetitions + 1, cfg.prompt_tokens[0] + len(cfg.num_assistant_tokens)
    if data is None:
        return random_prompts(RequestShape(count, length, 0), vocabulary, seed=0)
    from recipes.data.token_windows import read_windows

    length = data.manifest.result(DatasetResult).seq_length or length
    found: list[list[int]] = read_windows(data, "heldout", length, count).tokens.tolist()
    if len(found) < 2:
        raise RecipeError(
            f"the held-out text has {len(found)} windows of {length} tokens; drafts need two.",
            "lower prompt_tokens, give more text, or clear num_assistant_tokens",
        )
    return found


def measure_speculation(
    pair: Sequence[Contender],
    windows: Sequence[list[int]],
    cfg: MeasureSpeedConfig,
    start: Callable[[Contender], Worker],
    log: MetricsLog,
) -> list[Speculation]:
    """Continues windows by the teacher of a pair alone and with its student, one after the other.

    For each length of a draft the prompts begin a token later, since engines remember beginnings;
    the first of them warms up and is dropped.
    """
    teacher, student = pair
    found: list[Speculation] = []
    with start(teacher) as alone, start(replace(teacher, draft=student.model)) as drafted:
        for done, length in enumerate(cfg.num_assistant_tokens, 1):
            prompts = [window[done - 1 :][: cfg.prompt_tokens[0]] for window in windows]
            written = [
                (
                    alone.write([prompt], cfg.new_tokens),
                    drafted.write([prompt], cfg.new_tokens, length),
                )
                for prompt in prompts
            ]
            found.append(_compare(teacher, length, cfg, written[1:]))
            log.progress("speculate", done, len(cfg.num_assistant_tokens))
    return found


def _compare(
    teacher: Contender,
    length: int,
    cfg: MeasureSpeedConfig,
    written: Sequence[tuple[Generation, Generation]],
) -> Speculation:
    """What drafts of a length changed."""
    drafts = [drafted for _, drafted in written]
    return Speculation(
        backend=teacher.backend,
        precision=teacher.precision,
        num_assistant_tokens=length,
        prompt_tokens=cfg.prompt_tokens[0],
        new_tokens=cfg.new_tokens,
        requests=len(written),
        same_tokens=sum(alone.tokens == drafted.tokens for alone, drafted in written)
        if drafts[0].tokens
        else None,
        acceptance=sum(one.accepted for one in drafts) / sum(one.drafted for one in drafts),
        speedup=spread(
            alone.timing.total_seconds / drafted.timing.total_seconds for alone, drafted in written
        ),
    )
