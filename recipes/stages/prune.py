"""Minitron pruning of width and depth: cuts the weights to what scored highest, without a pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.problems import Problem
from recipes.planning.targets import pruned, target_problems
from recipes.pruning.results import PruneResult, ScoreResult
from recipes.pruning.settings import PruneConfig, ScoreConfig
from recipes.stages.contract import Stage


def check(cfg: PruneConfig, chain: Chain) -> Iterator[Problem]:
    """Finds targets that the teacher cannot be pruned to, and scores that would be missing."""
    for what, fix in target_problems(chain.teacher, cfg.targets(), cfg.divisors()):
        yield Problem(rules.PRUNE_TARGET, what, fix)
    if cfg.target_num_layers is not None:
        yield from _score_problems(cfg, chain, chain.teacher.num_layers - cfg.target_num_layers)


def _score_problems(cfg: PruneConfig, chain: Chain, drop: int) -> Iterator[Problem]:
    """Whether the stage that scores, if it is of this run, measures what is asked for here."""
    name = cfg.inputs.get("importance", "")
    score = chain.stages.get(name)
    if not isinstance(score, ScoreConfig) or drop <= 0:
        return
    has = {
        "loss": score.num_loss_samples > 0,
        "block": drop in score.block_sizes,
        "greedy": drop <= score.num_greedy_layers,
    }
    wanted = {
        "loss": "num_loss_samples=8",
        "block": f"block_sizes=[{drop}]",
        "greedy": f"num_greedy_layers={drop}",
    }
    if not has.get(cfg.layer_importance, True):
        yield Problem(
            rules.LAYER_IMPORTANCE,
            f"layer_importance={cfg.layer_importance} drops {drop} layers by what "
            f"{name} does not measure",
            f"set stages.{name}.{wanted[cfg.layer_importance]}",
        )


def disk_bytes(cfg: PruneConfig, chain: Chain) -> int:
    """The student's checkpoint."""
    return 4 * pruned(chain.teacher, cfg.targets()).parameters()


def run(cfg: PruneConfig, inputs: Inputs, out: Path) -> Outcome:
    """Chooses what to keep, cuts the weights, and saves the student and the kept indices."""
    from nemo_convert import hf, nemo
    from recipes.pruning.cut_checkpoint import layers_to_keep, prune_checkpoint
    from recipes.pruning.importance import Importance
    from recipes.pruning.kept import choose

    teacher = nemo.find_checkpoint(inputs["checkpoint"].artifact)
    importance = Importance.load(inputs["importance"].artifact)
    whole = nemo.architecture_of(teacher)
    student = pruned(whole, cfg.targets())
    if cfg.drop_layers:
        layers = sorted(set(range(1, whole.num_layers + 1)) - set(cfg.drop_layers))
    else:
        layers = layers_to_keep(importance, cfg.layer_importance, student.num_layers)
    kept = choose(importance.widths, whole, student, layers)
    prune_checkpoint(teacher, student, kept, out / teacher.name)
    kept.save(out)
    scored = inputs["importance"].manifest.result(ScoreResult)
    measure, scores = importance.of_layers(cfg.layer_importance)
    return Outcome(
        PruneResult(
            kept_layers=kept.layers,
            layer_importance=scores,
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
    one_rank="it only copies weights",
    inputs={"checkpoint": ("checkpoint_nemo",), "importance": ("importance",)},
    disk_bytes=disk_bytes,
)

if __name__ == "__main__":
    STAGE.main()
