"""Ranks the architectures of a search by the quality of the pruned teacher, before any training.

Reads the teacher, its importance scores, the architectures from ``enumerate_shapes``, and text.
Reconstructs the best candidates by least squares before the final ranking. Writes
``candidates.json``, the best candidate first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from nemo_convert.architecture import Architecture
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.core.statistics import pareto_front
from recipes.planning.chain import Chain, sequence_problems
from recipes.planning.inference_cost import InferenceCost, Sequences, healing_cost, ranking_cost
from recipes.planning.results import PlanResult
from recipes.planning.rules import Problem
from recipes.planning.transformer import Compute, largest
from recipes.pruning.settings import layer_score_problems
from recipes.search.results import Candidate, SearchResult, write_candidates
from recipes.search.settings import SHAPES_FILE, EnumerateShapesConfig, RankCandidatesConfig
from recipes.search.space import Budget, layer_choices
from recipes.stages.contract import Stage


def check(cfg: RankCandidatesConfig, chain: Chain) -> Iterator[Problem]:
    """Yields problems of the sequences, and of scores that do not suffice to drop layers."""
    yield from sequence_problems(cfg.seq_length, cfg.inputs, chain)
    source = cfg.inputs.get("shapes", "")
    depths = [shape.num_layers for shape in chain.shapes.get(source, ())]
    search = chain.stages.get(source)
    # Before latency is measured, all depths of the search space are possible.
    if not depths and isinstance(search, EnumerateShapesConfig):
        depths = layer_choices(chain.teacher, search.space)
    drop_counts = {chain.teacher.num_layers - depth for depth in depths} - {0}
    yield from layer_score_problems(cfg, cfg.layer_importance, drop_counts, chain)


def inference_cost(cfg: RankCandidatesConfig, chain: Chain) -> InferenceCost:
    """Estimates the cost of measuring the teacher and all shapes, and of healing the best shapes.

    Healing (reconstruction by least squares) is estimated for the ``num_healed`` largest shapes,
    because the best are not known yet.
    """
    text = Sequences(cfg.num_samples, cfg.seq_length, cfg.micro_batch_size)
    calibration = replace(text, number=cfg.num_calibration_samples)
    bf16 = cfg.precision == "bf16-mixed"
    search = chain.stages.get(cfg.inputs.get("shapes", ""))
    # ``shapes`` returns the largest first. Shapes of a search in another run are not counted.
    shapes = search.shapes(chain.teacher) if isinstance(search, EnumerateShapesConfig) else []
    is_healed = cfg.num_healed > 0
    measuring = ranking_cost(chain.teacher, bf16, text, chain.hardware, healed=is_healed)
    healing = [
        healing_cost(chain.teacher, shape, calibration, chain.hardware)
        for shape in shapes[: cfg.num_healed]
    ]
    costs = [measuring, *healing]
    compute = sum((cost.compute for cost in costs), Compute())
    compute = sum((text.compute(shape, bf16) for shape in shapes), compute)
    memory = largest(*(cost.memory for cost in costs))
    # With healing, all FLOPs count as float32, because healing is in float32 and takes longest.
    return InferenceCost(memory, compute, bf16 and not healing)


def run(cfg: RankCandidatesConfig, inputs: Inputs, out: Path) -> Outcome:
    """Measures every architecture and writes the ranking."""
    from recipes.search.measure import measure_shapes

    shapes_json = (inputs["shapes"].artifact / SHAPES_FILE).read_text(encoding="utf-8")
    shapes = [Architecture(**fields) for fields in json.loads(shapes_json)]
    candidates = measure_shapes(cfg, inputs, shapes, metrics_log(out))
    ranked = ranking(candidates)
    write_candidates(out, ranked)
    shapes_manifest = inputs["shapes"].manifest
    # ``enumerate_shapes`` has multiplied limits that are fractions by the teacher's cost.
    limits = shapes_manifest.result(PlanResult).summary
    names = Budget(**shapes_manifest.config["budget"]).limits()
    budget = {name: float(limits[name]) for name in names}  # type: ignore[arg-type]
    return Outcome(SearchResult(ranked, budget))


def ranking(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns the candidates, the best first, and marks the Pareto front of size and proxy.

    The proxies of healed candidates cannot be compared with those of other candidates. So healed
    candidates come first. If there are any, only they can be on the front.
    """
    ranked = sorted(candidates, key=lambda candidate: (not candidate.healed, candidate.proxy))
    comparable = [candidate for candidate in ranked if candidate.healed] or ranked
    front = pareto_front([(candidate.parameters, candidate.proxy) for candidate in comparable])
    # ``ranked`` starts with ``comparable``, so the indices in ``front`` are valid for both.
    return [replace(candidate, pareto=i in front) for i, candidate in enumerate(ranked)]


STAGE = Stage(
    config=RankCandidatesConfig,
    kind="search_results",
    run=run,
    check=check,
    inference_cost=inference_cost,
    single_rank_reason="the text is not split over ranks",
    inputs={
        "checkpoint": ("checkpoint_nemo",),
        "importance": ("importance",),
        "data": ("dataset",),
        "shapes": ("shapes",),
    },
)
