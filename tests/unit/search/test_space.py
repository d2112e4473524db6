"""Shapes within a budget, by closed form: published ones, and by brute force."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from launch.plan import with_shapes
from launch.schema import compose
from nemo_convert.architecture import Architecture
from recipes.core.errors import RecipeError
from recipes.core.run_state import request_of
from recipes.core.stage import Input, Resources
from recipes.distillation.settings import DistillConfig
from recipes.engines.settings import BuildEngineConfig
from recipes.planning.chain import Chain
from recipes.search.latency import fit
from recipes.search.results import Candidate
from recipes.search.settings import (
    EnumerateShapesConfig,
    MeasureLatencyConfig,
    RankCandidatesConfig,
    SuccessiveHalvingConfig,
)
from recipes.search.space import (
    Budget,
    LatencyFit,
    Service,
    Space,
    cache_bytes,
    corners,
    latency_ms,
    memory_bytes,
    middle,
    name_of,
    read_gigabytes,
    weight_bytes,
)
from recipes.search.space import enumerate_shapes as shapes_of
from recipes.stages import enumerate_shapes, measure_latency, rank_candidates, successive_halving
from tests.support.manifests import bare_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from launch.plan import Plan
    from tests.unit.conftest import Launch

QWEN3_8B = Architecture(
    "LlamaForCausalLM", 36, 4096, 12288, 32, 8, 128, 151936, 40960, tied_embeddings=False
)
"""Without the norms of queries and keys, which are 9,216 parameters of 8 billion."""
LLAMA_70B = Architecture(
    "LlamaForCausalLM", 80, 8192, 28672, 64, 8, 128, 128256, 131072, tied_embeddings=False
)
SMOLLM2 = Architecture(
    "LlamaForCausalLM", 30, 576, 1536, 9, 3, 64, 49152, 8192, tied_embeddings=True
)
COARSE = Space(hidden_size_divisor=256, ffn_hidden_size_divisor=512)


def test_the_published_shape_of_qwen3_is_found() -> None:
    """NVIDIA/Model-Optimizer's search for 6B: 30 layers, hidden 3584, ffn 11776."""
    shapes = {name_of(s): s for s in shapes_of(QWEN3_8B, COARSE, {"parameters": 6e9}, Service())}
    assert round(shapes["l30-h3584-f11776-a32"].parameters() / 1e9, 2) == 5.99


def test_a_large_model_is_enumerated_without_torch(root: Path) -> None:
    code = (
        "import sys; from recipes.search.space import *; from recipes.search import settings as e;"
        f"from nemo_convert.architecture import Architecture; t = {LLAMA_70B!r};"
        "space = Space(hidden_size_divisor=256, ffn_hidden_size_divisor=512, prune_heads=True);"
        "budget = Budget(parameters=0.5);"
        "print(len(e.EnumerateShapesConfig(budget=budget, space=space).shapes(t)));"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 100


@pytest.mark.parametrize(
    "budget",
    [
        {"parameters": 0.75},
        {"parameters": 1e8, "memory_bytes": 2.05e8},
        {"latency_ms": 0.7},
        {"weight_bytes": 0.8},
    ],
)
def test_shapes_are_those_that_cannot_grow(budget: dict[str, float]) -> None:
    """Against every combination of sizes, counted one by one."""
    space = Space(hidden_size_divisor=96, ffn_hidden_size_divisor=256, prune_heads=True)
    service = Service(context_length=512)
    costs: dict[str, Any] = {
        "parameters": lambda s: s.parameters(),
        "weight_bytes": lambda s: 2 * s.parameters(),
        "memory_bytes": lambda s: memory_bytes(s, service),
        "latency_ms": lambda s: latency_ms(s, service),
    }
    limits = {n: x * costs[n](SMOLLM2) if x <= 1 else x for n, x in budget.items()}
    axes = {
        "num_layers": range(18, 31),
        "hidden_size": (384, 480, 576),
        "ffn_hidden_size": (1024, 1280, 1536),
        "num_attention_heads": (6, 9),
    }
    fitting = {
        sizes
        for sizes in itertools.product(*axes.values())
        if all(
            costs[n](dataclasses.replace(SMOLLM2, **dict(zip(axes, sizes, strict=True)))) <= limit
            for n, limit in limits.items()
        )
    }
    largest = {
        one
        for one in fitting
        if not any(
            other != one and all(a >= b for a, b in zip(other, one, strict=True))
            for other in fitting
        )
    }
    found = shapes_of(SMOLLM2, space, budget, service)
    assert {tuple(getattr(s, axis) for axis in axes) for s in found} == largest
    assert largest
    sizes = [s.parameters() for s in found]
    assert sizes == sorted(sizes, reverse=True)


def test_shapes_can_be_split_as_planned() -> None:
    space = dataclasses.replace(COARSE, tensor_model_parallel_size=16, prune_heads=True)
    teacher = dataclasses.replace(QWEN3_8B, num_query_groups=16, num_attention_heads=48)
    found = shapes_of(teacher, space, {"parameters": 6e9}, Service())
    assert {s.num_attention_heads for s in found} == {32, 48}
    space = dataclasses.replace(space, tensor_model_parallel_size=3)
    found = shapes_of(teacher, space, {"parameters": 6e9}, Service())
    assert found
    for shape in found:
        sizes = (shape.num_attention_heads, shape.hidden_size, shape.ffn_hidden_size)
        assert all(size % 3 == 0 for size in sizes)


def test_costs_of_serving() -> None:
    """Llama 3 70B at bfloat16: 141 GB of weights, 1.34 GB of cache at 4096 tokens."""
    service = Service(batch_size=2)
    assert weight_bytes(LLAMA_70B, service) == pytest.approx(141.1e9, rel=1e-3)
    assert cache_bytes(LLAMA_70B, service) == 2 * 2 * 80 * 8 * 128 * 4096 * 2
    assert memory_bytes(LLAMA_70B, service) == weight_bytes(LLAMA_70B, service) + cache_bytes(
        LLAMA_70B, service
    )
    read = 2 * (LLAMA_70B.parameters() - 128256 * 8192) + cache_bytes(LLAMA_70B, service)
    assert latency_ms(LLAMA_70B, service) == pytest.approx(1e3 * read / 3.35e12, rel=1e-3)
    # Of int4 the layers, with scale and zero point of 64 weights; embedding and head in 8 bits.
    tables = 2 * 128256 * 8192
    bits = 4 * (LLAMA_70B.parameters() - tables) * (1 + 5 / 64) + 8 * tables
    assert weight_bytes(LLAMA_70B, Service(precision="int4")) == pytest.approx(bits / 8)
    fp8 = 8 * (LLAMA_70B.parameters() - tables) + 16 * tables
    assert weight_bytes(LLAMA_70B, Service(precision="fp8")) == pytest.approx(fp8 / 8)
    crowd = dataclasses.replace(service, batch_size=4096, context_length=1)
    flops = 4096 * 2 * (LLAMA_70B.parameters() - 128256 * 8192)
    assert latency_ms(LLAMA_70B, crowd) == pytest.approx(1e3 * flops / 9.89e14, rel=1e-2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "is empty"),
        ({"budget": Budget(parameters=10.0)}, "no architecture fits"),
        ({"budget": Budget(tokens_per_second=1e12)}, "no architecture fits"),
        ({"budget": Budget(tokens_per_second=0.7)}, "the teacher is within the budget"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(
    chain: Chain, settings: dict[str, Any], words: str
) -> None:
    [problem] = enumerate_shapes.check(EnumerateShapesConfig(**settings), chain)
    assert problem.rule.name == "budget"
    assert words in str(problem)


def test_the_launcher_lists_shapes_at_once(launch: Launch, hf_folder: Path) -> None:
    done = launch(
        "recipe=llama_search",
        "only=[enumerate_shapes]",
        f"model.hf_path={hf_folder}",
        "stages.enumerate_shapes.space={hidden_size_divisor: 32, ffn_hidden_size_divisor: 64}",
        "data.seq_length=64",
        "run_dir=run",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"l\d-h\d+-f\d+-a8", done.stdout)) == 2
    assert "latency by roofline of cpu" in done.stdout
    assert re.search(r"enumerate_shapes +ran .* \d+ shapes", done.stdout)


@pytest.mark.parametrize("recipe", ["llama_search", "shrink"])
def test_latency_is_measured_for_what_is_searched(plan: Callable[..., Plan], recipe: str) -> None:
    space = "stages.enumerate_shapes.space.hidden_size_divisor=32"
    service = "stages.enumerate_shapes.service.batch_size=4"
    planned = {
        stage.name: stage
        for stage in plan(
            "latency_model=measured", space, service, recipe=f"recipe={recipe}"
        ).stages
    }
    measured: Any = planned["measure_latency"].config
    search: Any = planned["enumerate_shapes"].config
    assert (measured.space, measured.service) == (search.space, search.service)
    assert (search.space.hidden_size_divisor, search.service.batch_size) == (32, 4)
    assert search.service.precision == measured.engine.precision == "fp32"
    assert planned["enumerate_shapes"].inputs["latency"].kind == "latency_model"


def test_experts_are_not_searched(chain: Chain) -> None:
    mixture = dataclasses.replace(chain.teacher, num_moe_experts=8)
    cfg = EnumerateShapesConfig(budget=Budget(parameters=0.5))
    [problem] = enumerate_shapes.check(cfg, dataclasses.replace(chain, teacher=mixture))
    assert "experts" in problem.what


def test_rounds_halve_the_candidates_under_the_token_budget(chain: Chain) -> None:
    cfg = SuccessiveHalvingConfig(num_candidates=4, also=["x"], max_tokens=120_000)
    rounds = cfg.rounds(cfg.most())
    assert rounds == [5, 3, 2]
    trainings = [successive_halving.training_of(cfg, rounds, number) for number in range(3)]
    used = sum(n * t.max_steps * 4 * 256 for n, t in zip(rounds, trainings, strict=True))
    assert 0.9 * cfg.max_tokens < used <= cfg.max_tokens
    # The windows of a round are not those that the candidates have just learnt from.
    assert len({training.seed for training in trainings}) == 3
    assert list(successive_halving.check(cfg, chain)) == []
    alone = SuccessiveHalvingConfig(num_candidates=1, max_tokens=0)
    assert alone.rounds(alone.most()) == []
    assert list(successive_halving.check(alone, chain)) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_tokens": 9000}, "less than two steps"),
        (
            {
                "num_candidates": 1,
                "resources": Resources(devices=2),
                "distill": DistillConfig(resources=Resources(devices=2)),
            },
            "distill.resources.devices=2",
        ),
    ],
)
def test_a_tournament_that_cannot_be_played_is_refused(
    chain: Chain, settings: dict[str, Any], words: str
) -> None:
    [problem] = successive_halving.check(SuccessiveHalvingConfig(**settings), chain)
    assert problem.rule.name == "search"
    assert words in str(problem)


def test_names_that_are_no_candidates_are_refused(chain: Chain) -> None:
    space = Space(hidden_size_divisor=32, ffn_hidden_size_divisor=64)
    search = EnumerateShapesConfig(
        stage="enumerate_shapes", budget=Budget(parameters=0.75), space=space
    )
    ranking = RankCandidatesConfig(stage="rank_candidates", inputs={"shapes": "shapes"})
    stages = {"shapes": search, "ranking": ranking}
    chain = with_shapes(dataclasses.replace(chain, stages=stages), stages)
    known = name_of(search.shapes(chain.teacher)[0])
    for also, what in (([known], []), ([known, known[:-1] + "9"], [f"Did you mean '{known}'?"])):
        cfg = SuccessiveHalvingConfig(also=also, inputs={"candidates": "ranking"})
        problems = list(successive_halving.check(cfg, chain))
        assert [p.rule.name for p in problems] == ["search"] * len(what)
        assert all(words in p.what for words, p in zip(what, problems, strict=True))
    # What fits a budget of measured latency is not known before it was measured.
    timed = dataclasses.replace(search, inputs={"latency": "measure_latency"})
    stages = {**stages, "shapes": timed}
    chain = with_shapes(dataclasses.replace(chain, stages=stages), stages)
    assert list(successive_halving.check(cfg, chain)) == []


def test_where_a_candidate_is_trained_is_not_what_it_is() -> None:
    """A halving that resumes with other resources keeps what was trained."""
    config = DistillConfig(stage="distill")
    small, large = (
        request_of(
            "distill",
            dataclasses.replace(config, micro_batch_size=n, resources=Resources(devices=n)),
            {},
        )
        for n in (1, 2)
    )
    assert small.config != large.config
    assert small.fingerprint == large.fingerprint
    assert (
        small.fingerprint
        != request_of("distill", dataclasses.replace(config, lr=1.0), {}).fingerprint
    )


def test_a_candidate_is_on_the_front_unless_another_is_smaller_and_better() -> None:
    sizes = {
        "a": (10, 1.0),
        "b": (9, 2.0),
        "c": (9, 3.0),
        "d": (11, 1.0),
        "e": (8, 2.5),
        "f": (12, 0.5),  # alone is not healed
    }
    every = [
        Candidate(
            name,
            parameters,
            proxy,
            9.0,
            proxy,
            healed=name != "f",
            tokens=0,
            chosen=False,
            pareto=False,
            shape=SMOLLM2,
        )
        for name, (parameters, proxy) in sizes.items()
    ]
    ranked = rank_candidates.ranking(every)
    assert [c.name for c in ranked] == ["a", "d", "b", "e", "c", "f"]
    assert [c.name for c in ranked if c.pareto] == ["a", "b", "e", "f"]


def test_a_ranking_that_cannot_be_made_is_refused(chain: Chain) -> None:
    cfg = RankCandidatesConfig(seq_length=2000)
    assert len(list(rank_candidates.STAGE.check(cfg, chain))) == 1


def test_a_measured_line_is_found_again_and_keeps_a_budget() -> None:
    """Steps of 2 ms, 0.1 ms a layer and 20 ms for 10⁹ bytes."""
    truth, service = LatencyFit(2.0, 0.1, 20.0), Service(precision="fp32", context_length=256)
    shapes = corners(SMOLLM2, Space(prune_heads=True))
    assert len(shapes) == 6
    steps = [latency_ms(s, dataclasses.replace(service, measured=truth)) for s in shapes]
    assert steps[0] == pytest.approx(2 + 3 + 20 * read_gigabytes(SMOLLM2, service))
    line = fit(shapes, steps, service)
    assert dataclasses.astuple(line) == pytest.approx(dataclasses.astuple(truth), rel=1e-3)
    measured = dataclasses.replace(service, measured=line)
    found = shapes_of(SMOLLM2, Space(), {"latency_ms": 0.8}, measured)
    # Reading fewer bytes does not help with what every step and layer takes.
    assert max(s.parameters() for s in found) < 0.8 * SMOLLM2.parameters()
    assert all(latency_ms(s, measured) <= 0.8 * steps[0] for s in found)
    # Two requests at once get a token each in a step.
    pair = dataclasses.replace(measured, batch_size=2)
    least = 2e3 / (0.8 * latency_ms(SMOLLM2, pair))
    assert shapes_of(SMOLLM2, Space(), {"tokens_per_second": least}, pair) == shapes_of(
        SMOLLM2, Space(), {"latency_ms": 0.8}, pair
    )
    assert found != shapes_of(SMOLLM2, Space(), {"latency_ms": 0.8}, service)


def test_an_axis_never_takes_less_than_no_time() -> None:
    """Noise can make a fewer layers look slower than smaller ones."""
    shapes, service = corners(SMOLLM2, Space()), Service()
    steps = [10 * read_gigabytes(s, service) - 0.01 * s.num_layers for s in shapes]
    line = fit(shapes, steps, service)
    assert min(dataclasses.astuple(line)) >= 0
    assert line.gigabyte_ms > 0


def test_engines_that_size_does_not_make_faster_are_refused() -> None:
    shapes = corners(SMOLLM2, Space())
    with pytest.raises(RecipeError, match="smaller engines were not faster"):
        fit(shapes, [3.0 + 0.1 * n for n in range(len(shapes))], Service())


def test_the_middle_is_no_corner() -> None:
    shape = middle(SMOLLM2, Space())
    assert shape not in corners(SMOLLM2, Space())
    assert 18 < shape.num_layers < 30
    assert 384 <= shape.hidden_size < 576


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"service": Service(context_length=8)}, "length"),
        ({"service": Service(context_length=2000)}, "length"),
        ({"engine": BuildEngineConfig(precision="int3")}, "format"),
    ],
)
def test_latency_that_cannot_be_measured_is_refused(
    chain: Chain, settings: dict[str, Any], rule: str
) -> None:
    cfg = MeasureLatencyConfig(**{"service": Service(context_length=256), **settings})
    [problem] = measure_latency.check(cfg, chain)
    assert problem.rule.name == rule


def test_the_chosen_architecture_is_a_recipe(chain: Chain, tmp_path: Path) -> None:
    teacher = dataclasses.replace(
        bare_manifest("import_hf", "checkpoint_nemo", None),
        config={"hf_path": "org/model"},
        architecture=chain.teacher.as_dict(),
    )
    scores = dataclasses.replace(
        bare_manifest("score", "importance", None),
        config={"num_loss_samples": 8, "block_sizes": [1], "num_greedy_layers": 0},
    )
    inputs = {"checkpoint": Input(tmp_path, teacher), "importance": Input(tmp_path, scores)}
    shape = dataclasses.replace(chain.teacher, num_layers=3, hidden_size=64)
    winner = Candidate("name", 10**6, 1.0, 9.0, 0.1, False, 10, True, True, shape)
    cfg = SuccessiveHalvingConfig(distill=DistillConfig(lr=2e-4))
    (tmp_path / "recipe").mkdir()
    file = tmp_path / "recipe" / "chosen.yaml"
    file.write_text(successive_halving.recipe(cfg, inputs, winner, "block"))
    stages = compose("recipe=chosen", f"hydra.searchpath=[file://{tmp_path}]").stages
    assert (stages.prune.target_num_layers, stages.prune.target_hidden_size) == (3, 64)
    assert stages.prune.target_ffn_hidden_size is None
    assert stages.prune.layer_importance == "block"
    assert stages.score.block_sizes == [1]
    assert stages.distill.lr == 2e-4
