"""Composes configs with Hydra from a command line; lists recipes and choices."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
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
"""Config groups that ``GROUP=null`` leaves out."""
CHOICE = re.compile(r"[\w.-]*[a-df-z][\w.-]*", re.IGNORECASE)
"""Matches names such as 32k or my-7b. Without a letter other than e, Hydra may parse a number."""
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
    """Registers ``stage/<stage>/schema`` for each stage, and the resolvers of ``conf``."""
    OmegaConf.register_new_resolver("cpu", _cpu)
    OmegaConf.register_new_resolver("concatenate", lambda *lists: sum(lists, ListConfig([])))
    for name in stage_names():
        ConfigStore.instance().store(
            group=f"stage/{name}", name="schema", node=load_stage(name).config
        )


def _cpu(name: str, *, _root_: DictConfig) -> Any:
    """Returns a value of this machine's CPU profile. For Slurm, the value is valid for any CPU."""
    return cpu_profile(name, here=OmegaConf.select(_root_, "cluster.executor") != "slurm")


def compose(*arguments: str) -> DictConfig:
    """Composes a config from command-line arguments."""
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", hydra_arguments(arguments), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    OmegaConf.set_struct(cfg, False)  # otherwise nothing can be deleted
    del cfg["hydra"]
    OmegaConf.set_struct(cfg, True)
    return cfg


def groups() -> list[str]:
    """Returns the groups that a user chooses from."""
    internal = ("chain", "stage")
    folders = (path.name for path in CONF.iterdir() if path.is_dir())
    return sorted(name for name in folders if name not in internal)


def choices(group: str) -> list[str]:
    """Returns the names that a user can choose from a group; empty for an unknown group."""
    names = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    return [*names, "null"] if group in OPTIONAL_GROUPS else names


def choices_with(stage: str) -> list[str]:
    """Returns the choices of groups that add a stage, such as ``gguf=f16``."""
    files = sorted(file for group in groups() for file in (CONF / group).glob("*.yaml"))
    adding = (file for file in files if f"@stages.{stage}:" in file.read_text(encoding="utf-8"))
    return [f"{file.parent.name}={file.stem}" for file in adding]


def help_text() -> str:
    """Returns the text of ``--help``: commands, and every choice of every group."""
    return HELP + "\n".join(f"{group}: {', '.join(choices(group))}" for group in groups())


def hydra_arguments(arguments: Iterable[str]) -> list[str]:
    """Translates a command line to Hydra's syntax; refuses group values that are not names."""
    # Hydra cannot parse overrides on both sides of a flag, as in `recipe=R -m x=1,2`.
    ordered = sorted(arguments, key=lambda arg: arg not in ("-m", "--multirun"))
    return [_hydra_argument(arg) for arg in ordered]


def _hydra_argument(arg: str) -> str:
    group, equals, value = arg.partition("=")
    if not equals or group not in groups():
        return arg
    names = value.split(",")  # a sweep has several names
    for name in names:
        allowed = name == "null" and group in OPTIONAL_GROUPS
        if not allowed and (name.lower() in VALUES or not CHOICE.fullmatch(name)):
            hint = f"model.hf_path={value} for a folder or a hub id; " if group == "model" else ""
            raise RecipeError(f"{arg} names no {group}.", f"{hint}--help lists all names")
    # Hydra accepts null in files only; on the command line the empty list has the same effect.
    return f"{group}={','.join('[]' if name == 'null' else name for name in names)}"


def recipes() -> dict[str, str]:
    """Returns the description of each recipe."""
    return {file.stem: _description(file) for file in sorted((CONF / "recipe").glob("*.yaml"))}


def _description(recipe: Path) -> str:
    try:
        return str(OmegaConf.select(OmegaConf.load(recipe), "description", default=""))
    except (YAMLError, OmegaConfBaseException):
        return "unreadable"
