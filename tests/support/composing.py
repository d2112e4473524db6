"""Composes configs faster than Hydra, which takes a third of a second for each config."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from launch import schema

COMPOSED: dict[tuple[Path, tuple[str, ...]], tuple[bytes, DictConfig | None]] = {}
"""Pickled configs without overrides of fields, each with Hydra's own config.

The keys are the folder of configs and the chosen groups.
"""


def is_field(override: str) -> bool:
    """Returns whether an override sets a field, instead of a config group or a field of Hydra."""
    key = override.partition("=")[0].lstrip("+~")
    return key not in schema.groups() and not re.search(r"[/@]|^hydra\.", key)


def compose_from_cache(*overrides: str) -> DictConfig:
    """Composes a config from overrides, as the command line does.

    Fields are set in a copy of the cached config of the groups, by the function with which Hydra
    sets them.
    """
    arguments = schema.hydra_arguments(overrides)
    fields = OverridesParser.create().parse_overrides(list(filter(is_field, arguments)))
    if any(field.is_sweep_override() for field in fields):
        return schema.compose(*overrides)  # refuses these fields
    groups = tuple(override for override in overrides if not is_field(override))
    if (schema.CONF, groups) not in COMPOSED:
        composed = pickle.dumps(schema.compose(*groups))
        COMPOSED[schema.CONF, groups] = composed, HydraConfig.instance().cfg
    composed, HydraConfig.instance().cfg = COMPOSED[schema.CONF, groups]
    cfg: DictConfig = pickle.loads(composed)
    ConfigLoaderImpl._apply_overrides_to_config(fields, cfg)
    return cfg
