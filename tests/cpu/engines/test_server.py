"""Tests requests to a started server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import requests

from recipes.engines.server import free_port, serving


def test_requests_to_the_server_do_not_go_to_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "health").touch()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens at this port
    monkeypatch.setenv("no_proxy", "example.com")
    monkeypatch.setenv("NO_PROXY", "")
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), f"--directory={tmp_path}"]
    with serving(command, port, start_seconds=20) as address:
        assert requests.get(f"{address}/health", timeout=10).ok
