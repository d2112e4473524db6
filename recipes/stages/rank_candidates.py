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
from recipes.planning.inference_cost import InferenceCost, Sequences, healing_cost, ranking_cost
from recipes.planning.problems import Problem
from recipes.planning.transformer import Compute, largest
from recipes.search.results import Candidate, SearchResult, write_candidates
from recipes.search.settings import SHAPES_FILE, EnumerateShapesConfig, RankCandidatesConfig
from recipes.search.space import Budget
from recipes.stages.contract import Stage


def check(cfg: RankCandidatesConfig, chain: Chain) -> Iterator[Problem]:
    """Finds windows that are longer than the model's positions."""
    yield from window_problems(cfg.seq_length, chain)


def inference_cost(cfg: RankCandidatesConfig, chain: Chain) -> InferenceCost:
    """Costs the teacher, each shape as a view of its weights, and the healing of the largest ones.

    All of it counts as float32 if shapes are healed, as most of it is.
    """
    text = Sequences(cfg.num_samples, cfg.seq_length, cfg.micro_batch_size)
    calibration = replace(text, number=cfg.num_calibration_samples)
    bf16 = cfg.precision == "bf16-mixed"
    source = chain.stages.get(cfg.inputs.get("shapes", ""))
    shapes = source.shapes(chain.teacher) if isinstance(source, EnumerateShapesConfig) else []
    costs = [
        ranking_cost(chain.teacher, bf16, text, chain.hardware),
        *(
            healing_cost(chain.teacher, shape, calibration, chain.hardware)
            for shape in shapes[: cfg.num_healed]
        ),
    ]
    compute = sum((cost.compute for cost in costs), Compute())
    compute = sum((text.compute(shape, bf16) for shape in shapes), compute)
    memory = largest(*(cost.memory for cost in costs))
    return InferenceCost(memory, compute, bf16 and len(costs) == 1)


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
    inference_cost=inference_cost,
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
