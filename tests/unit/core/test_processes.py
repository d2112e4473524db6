"""What is forked dies with what it was forked from."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from recipes.core.files import REPO_ROOT

PARENT = """
import os, time
from recipes.core.processes import children_die_with_this
os.register_at_fork(after_in_child=lambda: time.sleep({late}))
children_die_with_this()
if os.fork() == 0:
    time.sleep({late})
    os.fork()
    time.sleep(60)
time.sleep({lives})
os._exit(0)
"""


@pytest.mark.parametrize(
    ("late", "lives"), [(0, 1), (2, 0.5)], ids=["long there", "while it forks"]
)
def test_children_die_with_what_forked_them(late: float, lives: float) -> None:
    """All hold the pipe's writing end, so its end is theirs."""
    reading, writing = os.pipe()
    program = PARENT.format(late=late, lives=lives)
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, pass_fds=[writing], cwd=REPO_ROOT)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == ""
    assert time.monotonic() - began < 30
