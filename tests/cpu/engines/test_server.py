"""Tests the start of servers, and requests to fake servers."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import pytest
import requests
from lm_eval.api.instance import Instance

from recipes.engines import served_lm
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


def test_generated_text_reports_progress_after_each_request(
    odd_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog stops a stage without progress. A fake server echoes each request's number."""
    client = served_lm.ServedLM("http://localhost", odd_llama, 64)
    reports: list[tuple[int, int]] = []
    client.progress = lambda done, total: reports.append((done, total))
    numbers = count()

    def answer(messages: object, **options: object) -> dict[str, object]:
        return {"choices": [{"index": 0, "text": str(next(numbers))}]}

    monkeypatch.setattr(client, "model_call", answer)
    requests = [
        Instance("generate_until", {}, (f"text {number}", {"until": [], "max_gen_toks": 3}), number)
        for number in range(3)
    ]
    assert client.generate_until(requests) == ["0", "1", "2"]
    assert reports == [(1, 3), (2, 3), (3, 3)]
