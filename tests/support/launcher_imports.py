"""Prepares a fork server for ``fork_launcher``: imports the launcher and fills its caches.

The forks also inherit the patch that makes disks look large.
"""

from __future__ import annotations

from pathlib import Path

from launch import run as run  # imported only for the forks; "as run" marks this for linters
from launch.plan import make_plan
from launch.schema import compose
from launch.settings import settings_of
from tests.support.disks import large_disks

large_disks().start()
cfg = compose("recipe=llama_width_prune")
make_plan(cfg, settings_of(cfg), Path("nowhere"))  # only computes: writes no run directory
