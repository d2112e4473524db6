"""Reads and checks the stages of a composed config: their settings, order, shapes and inputs."""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.hydra_errors import fix_of, refuse_unknown_fields
from launch.planned import load_stage, stage_of
from launch.schema import choices_with
from recipes.core.constraints import computed_settings, violations
from recipes.core.errors import RecipeError, did_you_mean, require_known
from recipes.core.manifest import check_artifact
from recipes.core.stage import StageConfig
from recipes.planning.chain import Chain
from recipes.stages.contract import Stage


def typed_stages(cfg: DictConfig) -> dict[str, StageConfig]:
    """Returns the settings of each stage of a composed config, by name; refuses invalid values."""
    typed: dict[str, StageConfig] = {}
    invalid: list[str] = []
    for name, node in cfg.stages.items():
        where = f"stages.{name}"
        if not issubclass(OmegaConf.get_type(node) or dict, StageConfig):
            raise RecipeError(f"{where}={node} is not a stage.", f"leave it out: '~{where}'")
        refuse_unknown_fields(node, where)
        try:
            config: StageConfig = OmegaConf.to_object(node)  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            message = str(error).splitlines()[0]
            raise RecipeError(f"{where}: {message}", fix_of(message)) from error
        if type(config) is not load_stage(config.stage).config:
            raise RecipeError(
                f"invalid {where}.stage={config.stage}: its settings are those of another stage.",
                "leave it out; to add a stage, use its own settings in conf/stage",
            )
        config.name = str(name)
        invalid += [*violations(config, where), *computed_settings(config, where)]
        typed[name] = config
    if invalid:
        raise RecipeError("\n".join(invalid), fix="")
    if not typed:
        raise RecipeError(
            "the recipe has no stages.", "choose a recipe that has some, and do not set stages={}"
        )
    return typed


def known_stages(names: Iterable[str], configs: Mapping[str, StageConfig], where: str) -> set[str]:
    """Returns the ``names`` as a set; refuses names of no stage. ``where`` is their setting."""
    for name in names:
        require_known(name, configs, f"{where}: there is no stage '{name}'")
    return set(names)


def stage_order(configs: Mapping[str, StageConfig]) -> list[str]:
    """Returns the stage names, each after its inputs; refuses unknown inputs and cycles."""
    graph: dict[str, set[str]] = {}
    for name, config in configs.items():
        for key, source in config.inputs.items():
            if source not in configs and not Path(source).is_dir():
                raise _unknown_input(f"stages.{name}.inputs.{key}={source}", source, configs)
        graph[name] = {source for source in config.inputs.values() if source in configs}
    try:
        graphlib.TopologicalSorter(graph).prepare()  # finds cycles; its order is not used
    except graphlib.CycleError as error:
        raise RecipeError(
            f"stages feed each other in a circle: {' → '.join(error.args[1])}.",
            "give one of them another input: stages.NAME.inputs",
        ) from error
    # Each iteration adds all stages whose inputs are already in ``order``, in the config's order.
    order: list[str] = []
    while len(order) < len(graph):
        order += [name for name in graph if name not in order and graph[name] <= set(order)]
    return order


def _unknown_input(setting: str, source: str, configs: Mapping[str, StageConfig]) -> RecipeError:
    what = f"{setting} is neither a stage of this recipe nor a stage directory."
    if choices := choices_with(source):  # each would add the stage to the recipe
        return RecipeError(what, f"set {' or '.join(choices)}")
    fix = f"use one of: {', '.join(configs)}, or a stage directory (runs/other/distill)"
    return RecipeError(what + did_you_mean(source, configs), fix)


def with_shapes(chain: Chain, order: Iterable[str]) -> Chain:
    """Adds each stage's possible architectures to the chain. ``order`` is from ``stage_order``."""
    for name in order:
        config = chain.stages[name]
        shapes = stage_of(config).shapes(config, chain)
        chain = replace(chain, shapes={**chain.shapes, name: shapes})
    return chain


def require_inputs(name: str, config: StageConfig, stages: Mapping[str, Stage[Any]]) -> None:
    """Refuses missing and unknown inputs of a stage, and inputs whose artifact has a wrong type.

    ``stages`` has the stages of this run, by name. An input that is not in ``stages`` is of another
    run. Such an input must be complete, and have the files of its manifest.
    """
    required, optional = stage_of(config).inputs, stage_of(config).optional_inputs
    names, allowed = config.inputs.keys(), {**optional, **required}
    missing_inputs, unknown_inputs = required.keys() - names, names - allowed.keys()
    if missing_inputs or unknown_inputs:
        optional_text = f" and may have {', '.join(optional)}" if optional else ""
        raise RecipeError(
            f"stages.{name}.inputs has {', '.join(names) or 'nothing'}; "
            f"{config.stage} needs {', '.join(required) or 'nothing'}{optional_text}.",
            f"set all inputs that {config.stage} needs, and no unknown inputs",
        )
    for key, source in config.inputs.items():
        stage = stages.get(source)
        kind = stage.kind if stage else check_artifact(Path(source).resolve(), rehash=False).kind
        if kind not in allowed[key]:
            kinds = " or ".join(allowed[key])
            raise RecipeError(
                f"stages.{name}.inputs.{key}={source} is a {kind}; a {kinds} is needed.",
                f"set it to a stage whose artifact is a {kinds}",
            )
