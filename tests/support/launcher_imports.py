"""What each start of the launcher works out anew, worked out before it is forked."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from launch import run as run  # what it imports
from launch import schema
from launch.plan import make_plan
from launch.settings import settings_of
from tests.support.disks import pretend_room

pretend_room()
schema.register()
with initialize_config_dir(str(schema.CONF), version_base="1.3"):
    cfg = compose("config", ["recipe=llama_width_prune"], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    make_plan(cfg, settings_of(cfg), Path("nowhere"))
