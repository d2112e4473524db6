"""Minitron pruning of width and depth: cuts the weights to what scored highest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from nemo_convert.architecture import Architecture
from recipes.core.manifest import Outcome, manifest_of
from recipes.core.stage import Inputs
from recipes.distillation.results import KeptLayers
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.problems import Problem
from recipes.pruning.results import PruneResult, ScoreResult
from recipes.pruning.settings import PruneConfig, ScoreConfig
from recipes.pruning.targets import MOST_AT_ONCE, pruned, share_problems, target_problems
from recipes.search.settings import SuccessiveHalvingConfig
from recipes.search.space import name_of
from recipes.stages.contract import Stage


def student_of(cfg: PruneConfig, chain: Chain) -> Architecture:
    """Returns the shape of the pruned model: the largest where a search is still to choose it."""
    before = chain.shape_of(cfg.inputs.get("checkpoint"))
    if "shape" in cfg.inputs:
        return cfg.on_the_way(before, chain.shape_of(cfg.inputs["shape"]))
    return cfg.on_the_way(before, pruned(before, cfg.targets(chain.teacher)))


def check(cfg: PruneConfig, chain: Chain) -> Iterator[Problem]:
    """Finds targets that the teacher cannot be pruned to, and scores that would be missing."""
    teacher, before = chain.teacher, chain.shape_of(cfg.inputs.get("checkpoint"))
    student = student_of(cfg, chain)
    if "shape" in cfg.inputs:
        yield from _search_problems(cfg, chain, student)
    else:
        wrong = list(share_problems(teacher, cfg.asked(), cfg.divisors()))
        yield from wrong or target_problems(before, cfg.targets(teacher), cfg.divisors())
    if not cfg.drop_layers:
        yield from _score_problems(cfg, chain, before.num_layers - student.num_layers)
    elif cfg.part is not None:
        yield Problem(
            rules.PRUNE_TARGET,
            f"drop_layers={cfg.drop_layers} cannot be gone a part of the way",
            "set target_num_layers instead, or leave rounds out",
        )
    yield from _large_cut_problems(cfg, chain, before, student)


def _search_problems(cfg: PruneConfig, chain: Chain, student: Architecture) -> Iterator[Problem]:
    """Whether a search's choice can be taken, and what stands for it until it is known."""
    source = cfg.inputs["shape"]
    if cfg.asked() or cfg.drop_layers:
        yield Problem(
            rules.PRUNE_TARGET,
            f"{cfg.stage} has targets, and takes its shape from {source}",
            f"leave the targets out, or '~stages.{cfg.stage}.inputs.shape'",
        )
    search, manifest = chain.stages.get(source), manifest_of(source)
    if isinstance(search, SuccessiveHalvingConfig):
        shapes = chain.shapes.get(source, ())
        yield Problem(
            rules.SEARCHED_SHAPE,
            f"which shape {source} chooses is not known yet; what is planned and checked is "
            + (f"the largest of {len(shapes)} within the budget" if shapes else "the teacher's")
            + f", {name_of(student)} of {student.parameters() / 1e6:,.0f} M parameters",
            "take what is planned as the most that it may be, and not as what it will be",
        )
    elif search is not None or manifest is None or manifest.architecture is None:
        yield Problem(
            rules.PRUNE_TARGET,
            f"{source} has chosen no shape",
            f"set stages.{cfg.stage}.inputs.shape to a successive_halving, run again if it is old",
        )


def _large_cut_problems(
    cfg: PruneConfig, chain: Chain, before: Architecture, student: Architecture
) -> Iterator[Problem]:
    """Whether more goes at once than comes back well."""
    left = student.parameters() / before.parameters()
    if 1 - left > MOST_AT_ONCE:
        needed = math.ceil(math.log(left) / math.log(1 - MOST_AT_ONCE))
        alone = cfg.part is None and before == chain.teacher
        yield Problem(
            rules.LARGE_CUT,
            f"{1 - left:.0%} of the parameters go at once",
            f"rounds={needed}: pruned and distilled {needed} times, an equal part of the way each"
            if alone
            else "cut less, or raise rounds",
        )


def _score_problems(cfg: PruneConfig, chain: Chain, drop: int) -> Iterator[Problem]:
    """Whether the stage that scores, if it is of this run, measures what is asked for here."""
    name = cfg.inputs.get("importance", "")
    score = chain.stages.get(name)
    if not isinstance(score, ScoreConfig) or drop <= 0:
        return
    needs = {
        "loss": (score.num_loss_samples > 0, "num_loss_samples=8"),
        "block": (
            score.block_sizes is None or drop in score.block_sizes,
            f"block_sizes=[{drop}]",
        ),
        "greedy": (drop <= score.num_greedy_layers, f"num_greedy_layers={drop}"),
    }
    has, wanted = needs.get(cfg.layer_importance, (True, ""))
    if not has:
        yield Problem(
            rules.LAYER_IMPORTANCE,
            f"layer_importance={cfg.layer_importance} drops {drop} layers by what "
            f"{name} does not measure",
            f"set stages.{name}.{wanted}",
        )


def run(cfg: PruneConfig, inputs: Inputs, out: Path) -> Outcome:
    """Chooses what to keep, cuts, and saves the student and the kept indices."""
    from nemo_convert import hf, nemo
    from recipes.pruning.cut_checkpoint import layers_to_keep, prune_checkpoint
    from recipes.pruning.importance import Importance
    from recipes.pruning.kept import choose

    teacher = nemo.find_checkpoint(inputs["checkpoint"].artifact)
    importance = Importance.load(inputs["importance"].artifact)
    whole = nemo.architecture_of(teacher)
    student = pruned(whole, cfg.targets(whole))
    if "shape" in inputs:
        student = Architecture(**(inputs["shape"].manifest.architecture or {}))
    student = cfg.on_the_way(whole, student)
    if cfg.drop_layers:
        layers = sorted(set(range(1, whole.num_layers + 1)) - set(cfg.drop_layers))
    else:
        layers = layers_to_keep(importance, cfg.layer_importance, student.num_layers)
    kept = choose(importance.widths, whole, student, layers)

    prune_checkpoint(teacher, student, kept, out / teacher.name)
    kept.save(out)
    scored = inputs["importance"].manifest.result(ScoreResult)
    measure, scores = importance.of_layers(cfg.layer_importance)
    earlier = inputs["checkpoint"].manifest.result(KeptLayers).kept_layers
    numbers = dict(enumerate(earlier or range(1, whole.num_layers + 1), start=1))
    return Outcome(
        PruneResult(
            kept_layers=[numbers[layer] for layer in kept.layers],
            layer_importance={numbers[layer]: score for layer, score in scores.items()},
            layer_measure=measure,
            calibration_tokens=scored.calibration_tokens,
            calibration_windows=scored.calibration_windows,
            teacher_parameters=inputs["checkpoint"].manifest.parameters,
        ),
        architecture=student.as_dict(),
        parameters=student.parameters(),
        tokenizer_sha256=hf.tokenizer_sha256(nemo.side_files(teacher)),
    )


STAGE = Stage(
    config=PruneConfig,
    kind="checkpoint_nemo",
    run=run,
    check=check,
    one_rank="it copies weights",
    inputs={"checkpoint": ("checkpoint_nemo",), "importance": ("importance",)},
    optional_inputs={"shape": ("search_results",)},
    shapes=lambda config, chain: [student_of(config, chain)],
    disk_bytes=lambda config, chain: 4 * student_of(config, chain).parameters(),
    resolve_from_chain=lambda config, chain: config.in_numbers(chain.teacher),
)

if __name__ == "__main__":
    STAGE.main()
