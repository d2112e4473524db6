"""Composes configs faster than Hydra does."""

from __future__ import annotations

import pickle
from collections.abc import Callable

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from launch import schema

PICKLED: dict[tuple[str, ...], bytes] = {}
"""Composed configs by overrides of groups. Unpickling is ten times faster than ``deepcopy``."""


def compose_quickly(compose: Callable[..., DictConfig], *arguments: str) -> DictConfig:
    """Calls ``compose`` only for overrides of groups; sets fields in a copy of the result.

    Hydra's own functions parse the overrides and set the fields, so errors are the same. To save
    time, ``compose`` must cache its results.
    """
    overrides = OverridesParser.create().parse_overrides(schema.hydra_arguments(arguments))
    groups, fields = [], []
    for argument, override in zip(arguments, overrides, strict=True):
        # Only a composition refuses a sweep.
        if override.is_sweep_override() or (schema.CONF / override.key_or_group).is_dir():
            groups.append(argument)
        else:
            fields.append(override)
    cfg = compose(*groups)
    if not fields:
        return cfg
    key = tuple(groups)
    if key not in PICKLED:
        PICKLED[key] = pickle.dumps(cfg)
    cfg = pickle.loads(PICKLED[key])
    ConfigLoaderImpl._apply_overrides_to_config(fields, cfg)
    return cfg
