"""Imports the launcher and fills its caches, once, in a process that tests then fork."""

from __future__ import annotations

from pathlib import Path

from launch import run as run
from launch.plan import make_plan
from launch.schema import compose
from launch.settings import settings_of
from tests.support.disks import large_disks

large_disks().start()
cfg = compose("recipe=llama_width_prune")
make_plan(cfg, settings_of(cfg), Path("nowhere"))
