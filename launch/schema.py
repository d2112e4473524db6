"""Composes configs with Hydra from a command line; lists recipes and the choices of groups."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from launch.planned import load_stage, stage_names
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT
from recipes.planning.hardware import cpu_profile

CONF = REPO_ROOT / "conf"
OPTIONAL_GROUPS = (
    "add_layers",
    "engine",
    "gguf",
    "heal",
    "long_context",
    "served",
    "tasks",
    "tracker",
)
"""Config groups that a user may omit with ``GROUP=null``."""
CHOICE = re.compile(r"[\w.-]*[a-df-z][\w.-]*", re.IGNORECASE)
"""Matches names of choices, such as 32k or my-7b. A name needs a letter other than e, because Hydra
parses 32 and 1e5 as numbers."""
FLAGS_WITH_VALUE = (
    *("-c", "--cfg", "-p", "--package", "--experimental-rerun"),
    *("-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir"),
)
"""Hydra's flags that always take the next argument as their value."""
VALUES = ("null", "true", "false", "nan", "inf")
"""Words that Hydra parses as values, not as names."""

HELP = """\
Turns a Hugging Face LLM into a smaller, faster one and proves that it kept its quality.

usage: python launch/run.py recipe=NAME [model=NAME | model.hf_path=DIR_OR_HUB_ID] [FIELD=VALUE ...]

  recipe=llama_width_prune                 run or resume the recipe in runs/llama_width_prune
  run_dir=DIR                              run or resume in this directory
  stages.prune.target_ffn_hidden_size=N    set any field (--cfg job shows them all)
  'only=[prune]'                           run only these stages
  'force=[distill]'                        run a stage and all later stages again
  'accept=[distill]'                       keep a result although code or settings changed
  dry_run=true                             write configs and scripts, start nothing
  rehearse=true                            check shapes and memory at full size without a GPU
  'skip_rules=[memory]'                    run although this rule finds an error
  -m stages.prune.target_num_layers=20,24  one run for each value
  cluster=docker | slurm                   run in containers, or as Slurm jobs

  status, cancel or logs run_dir=DIR       about one run
  compare RUN1 RUN2 (or a sweep)           runs side by side
  runs [DIR], runs clean RUN               list runs, delete one
  doctor, doctor rules                     what this machine lacks; all rules
  (nothing)                                list the recipes

Groups; GROUP=NAME chooses:
"""


@cache
def register() -> None:
    """Registers ``stage/<stage>/schema`` for each stage, and the resolvers for ``conf``."""
    OmegaConf.register_new_resolver("cpu", _cpu)
    OmegaConf.register_new_resolver("concatenate", lambda *lists: sum(lists, ListConfig([])))
    store = ConfigStore.instance()
    for name in stage_names():
        store.store(group=f"stage/{name}", name="schema", node=load_stage(name).config)


def _cpu(name: str, *, _root_: DictConfig) -> Any:
    """Resolves ``${cpu:NAME}`` to a field of this machine's CPU profile.

    OmegaConf passes the whole config as ``_root_``.
    """
    # Slurm may run stages on other machines, so for Slurm the value must be valid for any CPU.
    return cpu_profile(name, here=OmegaConf.select(_root_, "cluster.executor") != "slurm")


def compose(*arguments: str) -> DictConfig:
    """Composes a config from command-line arguments, and sets Hydra's global config."""
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", hydra_arguments(arguments), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    OmegaConf.set_struct(cfg, False)  # otherwise ``del`` raises
    del cfg["hydra"]
    OmegaConf.set_struct(cfg, True)
    return cfg


def groups() -> list[str]:
    """Returns the config groups (folders of ``conf``) that a user chooses from."""
    internal = ("chain", "stage")
    folders = (path.name for path in CONF.iterdir() if path.is_dir())
    return sorted(name for name in folders if name not in internal)


def choices(group: str) -> list[str]:
    """Returns the names that a user can choose from a group; empty for an unknown group."""
    names = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    return [*names, "null"] if group in OPTIONAL_GROUPS else names


def choices_with(stage: str) -> list[str]:
    """Returns each choice of a group that adds the stage to a recipe, such as ``gguf=f16``."""
    files = sorted(file for group in groups() for file in (CONF / group).glob("*.yaml"))
    # An entry "/stage/MODULE@stages.STAGE: default" in the defaults list of a file adds a stage.
    entry = f"@stages.{stage}:"
    return [f"{f.parent.name}={f.stem}" for f in files if entry in f.read_text(encoding="utf-8")]


def help_text() -> str:
    """Returns the text of ``--help``: usage, and every choice of every group."""
    return HELP + "\n".join(f"{group}: {', '.join(choices(group))}" for group in groups())


def hydra_arguments(arguments: Iterable[str]) -> list[str]:
    """Translates a command line to Hydra's syntax; refuses group values that are not names."""
    # Hydra cannot parse overrides on both sides of a flag, as in `recipe=R -m x=1,2`. So all flags
    # and their values are moved to the end.
    overrides, flags = list[str](), list[str]()
    remaining = iter(arguments)
    for arg in remaining:
        if arg.startswith("-"):
            num_values = 1 if arg in FLAGS_WITH_VALUE else 0
            flags += [arg, *islice(remaining, num_values)]
        else:
            overrides.append(_hydra_override(arg))
    return overrides + flags


def _hydra_override(arg: str) -> str:
    """Translates an override to Hydra's syntax; changes ``run_dir=WORD`` and ``GROUP=null``."""
    key, equals, value = arg.partition("=")
    group = key.lstrip("+")  # "+" adds a group
    if group == "run_dir" and value != "null" and re.fullmatch(r"[\w.-]+", value):
        return f'{key}="{value}"'  # Hydra would parse 2025_01_02 as the number 20250102
    if not equals or group not in groups():
        return arg
    names = value.split(",")  # a sweep has several names
    for name in names:
        omits_group = name == "null" and group in OPTIONAL_GROUPS
        if not omits_group and (name.lower() in VALUES or not CHOICE.fullmatch(name)):
            is_model = group == "model" and name.lower() not in VALUES
            hint = f"model.hf_path={value} for a folder or a hub id; " if is_model else ""
            raise RecipeError(f"{arg} names no {group}.", f"{hint}--help lists all names")
        if name.endswith(".yaml"):  # Hydra accepts it, but would also put it into the run_dir
            raise RecipeError(f"{arg} names a file.", f"{key}={value.replace('.yaml', '')}")
    # Hydra accepts a null group in files only. On the command line, an empty list has that effect.
    return f"{key}={','.join('[]' if name == 'null' else name for name in names)}"


def recipes() -> dict[str, str]:
    """Maps the name of each recipe to its description."""
    return {file.stem: _description(file) for file in sorted((CONF / "recipe").glob("*.yaml"))}


def _description(recipe: Path) -> str:
    """Returns the field ``description`` of a recipe's file; empty without this field."""
    try:
        return str(OmegaConf.select(OmegaConf.load(recipe), "description", default=""))
    except (YAMLError, OmegaConfBaseException):
        return "unreadable"
