"""Ranks shapes by how well the teacher cut to them still predicts text: healed, but not trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from nemo_convert.architecture import Architecture
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.core.statistics import pareto_front
from recipes.planning.chain import Chain, window_problems
from recipes.planning.problems import Problem
from recipes.planning.reading import Reading, Text, fullest, healed, ranked
from recipes.search.results import Candidate, SearchResult, write_candidates
from recipes.search.settings import SHAPES_FILE, EnumerateShapesConfig, RankCandidatesConfig
from recipes.search.space import Budget
from recipes.stages.contract import Stage


def check(cfg: RankCandidatesConfig, chain: Chain) -> Iterator[Problem]:
    """Finds windows that are longer than the model's positions."""
    yield from window_problems(cfg.seq_length, chain)


def reading(cfg: RankCandidatesConfig, chain: Chain) -> Reading:
    """The teacher, in its weights every shape within the budget, and shapes that are healed.

    The largest count for these. All work counts as in float32 then, as most of it is.
    """
    text = Text(cfg.num_samples, cfg.seq_length, cfg.micro_batch_size)
    bf16 = cfg.precision == "bf16-mixed"
    found = ranked(chain.teacher, bf16, text, chain.hardware)
    source = chain.stages.get(cfg.inputs.get("shapes", ""))
    shapes = source.shapes(chain.teacher) if isinstance(source, EnumerateShapesConfig) else []
    calibration = replace(text, windows=cfg.num_calibration_samples)
    readings = [
        healed(chain.teacher, shape, calibration, chain.hardware)
        for shape in shapes[: cfg.num_healed]
    ]
    work = sum((text.work(shape, bf16) for shape in shapes), found.work)
    return Reading(
        fullest(found.memory, *(one.memory for one in readings)),
        sum((one.work for one in readings), work),
        bf16 and not readings,
    )


def run(cfg: RankCandidatesConfig, inputs: Inputs, out: Path) -> Outcome:
    """Measures every shape, heals the best, and writes ``candidates.json``, the best first."""
    from recipes.search.measure import measure_shapes

    listed = (inputs["shapes"].artifact / SHAPES_FILE).read_text(encoding="utf-8")
    shapes = [Architecture(**shape) for shape in json.loads(listed)]
    candidates = measure_shapes(cfg, inputs, shapes, metrics_log(out))
    best_first = ranking(candidates)
    write_candidates(out, best_first)
    budget = Budget(**inputs["shapes"].manifest.config["budget"]).limits()
    return Outcome(SearchResult(best_first, budget))


def ranking(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best first, with those marked that no other beats in both size and proxy."""
    front = pareto_front([(one.parameters, one.proxy) for one in candidates])
    marked = [replace(one, pareto=i in front) for i, one in enumerate(candidates)]
    return sorted(marked, key=lambda one: (not one.healed, one.proxy))


STAGE = Stage(
    config=RankCandidatesConfig,
    kind="search_results",
    run=run,
    check=check,
    reading=reading,
    one_rank="its windows are not split over ranks",
    inputs={
        "checkpoint": ("checkpoint_nemo",),
        "importance": ("importance",),
        "data": ("dataset",),
        "shapes": ("shapes",),
    },
)

if __name__ == "__main__":
    STAGE.main()
