"""``rounds=N``: prunes and distils several times as one chain, each time from the last student.

The stages that a recipe has are the last round's; those before it are the same with the model, the
scores and the sizes of their round. All rounds learn from the same teacher.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipes.core.errors import RecipeError

REPEATED = ("prune", "distill", "score")
HEALS = "heal"
"""Is repeated, too, in recipes that have it."""
EARLIER_ROUND = re.compile(rf"stages\.({'|'.join((*REPEATED, HEALS))})_\d+\.")


def in_rounds(cfg: DictConfig) -> Mapping[str, Any]:
    """The stage nodes of a composed config, with those of its earlier rounds."""
    stages, rounds = {str(name): node for name, node in cfg.stages.items()}, cfg.get("rounds", 1)
    if rounds == 1:
        return stages
    if missing := [name for name in REPEATED if name not in stages]:
        raise RecipeError(
            f"rounds={rounds}, but this recipe has no {' and no '.join(missing)}.",
            "leave rounds out, or choose a recipe that prunes and distils",
        )
    model, scores = (stages["prune"].inputs[name] for name in ("checkpoint", "importance"))
    for number in range(1, rounds):
        made: dict[str, dict[str, Any]] = {
            f"prune_{number}": {
                "round_fraction": 1 / (rounds - number + 1),
                "inputs": {"checkpoint": model, "importance": scores},
            },
            f"distill_{number}": {"inputs": {"student": f"prune_{number}"}},
            f"score_{number + 1}": {"inputs": {"checkpoint": f"distill_{number}"}},
        }
        if HEALS in stages:
            inputs = {"checkpoint": f"prune_{number}", "teacher": model}
            made[f"{HEALS}_{number}"] = {"inputs": inputs}
            made[f"distill_{number}"] = {"inputs": {"student": f"{HEALS}_{number}"}}
        for name, changed in made.items():
            alike = stages[name.rpartition("_")[0]]
            stages[name] = OmegaConf.merge(alike, changed, stages.get(name, {}))
        model, scores = f"distill_{number}", f"score_{number + 1}"
    last = {"prune": {"checkpoint": model, "importance": scores}, HEALS: {"teacher": model}}
    for name in stages.keys() & last.keys():
        stages[name] = OmegaConf.merge(stages[name], {"inputs": last[name]})
    return stages
