"""Composes configs faster than Hydra does."""

from __future__ import annotations

import copy
from collections.abc import Callable

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from launch import schema


def compose_quickly(compose: Callable[..., DictConfig], *arguments: str) -> DictConfig:
    """Composes only the overrides of groups; sets fields in a copy of the result.

    Hydra's own functions parse the overrides and set the fields, so errors are the same.

    Args:
        compose: Composes a config. It should cache its results.
        arguments: Overrides.
    """
    overrides = OverridesParser.create().parse_overrides(schema.hydra_arguments(arguments))
    groups, fields = [], []
    for argument, override in zip(arguments, overrides, strict=True):
        # Only a composition refuses a sweep.
        if override.is_sweep_override() or (schema.CONF / override.key_or_group).is_dir():
            groups.append(argument)
        else:
            fields.append(override)
    cfg = copy.deepcopy(compose(*groups))
    ConfigLoaderImpl._apply_overrides_to_config(fields, cfg)
    return cfg
