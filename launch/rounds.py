"""``rounds=N``: prunes and distils N times in one chain, each time from the previous student.

The recipe's own stages form the last round. Earlier rounds have copies of them, ``prune_1`` and so
on, with other inputs and sizes. All rounds distil from the same teacher.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipes.core.errors import RecipeError

REPEATED = ("prune", "distill", "score")
HEAL = "heal"
"""Optional stage, which is also repeated."""
EARLIER_ROUND = re.compile(rf"stages\.({'|'.join((*REPEATED, HEAL))})_\d+\.")
"""Matches the start of an override for a stage of an earlier round."""


def with_rounds(cfg: DictConfig) -> Mapping[str, Any]:
    """Returns the stage nodes of a composed config and their copies for earlier rounds."""
    stages: dict[str, Any] = {str(name): node for name, node in cfg.stages.items()}
    rounds = cfg.get("rounds", 1)
    if rounds == 1:
        return stages
    if missing := [name for name in REPEATED if name not in stages]:
        raise RecipeError(
            f"rounds={rounds}, but this recipe has no {' and no '.join(missing)}.",
            "leave rounds out, or choose a recipe that prunes and distils",
        )
    model, scores = (stages["prune"].inputs[name] for name in ("checkpoint", "importance"))
    for number in range(1, rounds):
        changes: dict[str, dict[str, Any]] = {
            f"prune_{number}": {
                "round_fraction": 1 / (rounds - number + 1),
                "inputs": {"checkpoint": model, "importance": scores},
            },
            f"distill_{number}": {"inputs": {"student": f"prune_{number}"}},
            f"score_{number + 1}": {"inputs": {"checkpoint": f"distill_{number}"}},
        }
        if HEAL in stages:
            inputs = {"checkpoint": f"prune_{number}", "teacher": model}
            changes[f"{HEAL}_{number}"] = {"inputs": inputs}
            changes[f"distill_{number}"] = {"inputs": {"student": f"{HEAL}_{number}"}}
        for name, change in changes.items():
            last_round = stages[name.rpartition("_")[0]]
            stages[name] = OmegaConf.merge(last_round, change, stages.get(name, {}))
        model, scores = f"distill_{number}", f"score_{number + 1}"
    last = {"prune": {"checkpoint": model, "importance": scores}, HEAL: {"teacher": model}}
    for name in stages.keys() & last.keys():
        stages[name] = OmegaConf.merge(stages[name], {"inputs": last[name]})
    return stages
