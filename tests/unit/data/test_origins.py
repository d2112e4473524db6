"""Licences and commits of sources, those on a hub from one that answers here."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from recipes.core.errors import RecipeError
from recipes.data.origins import origin_of, origins_of, pinned
from recipes.data.results import Origin

NEWEST, OLDER = "a" * 40, "b" * 40


class Hub(BaseHTTPRequestHandler):
    """One dataset with two commits, as the hub's API describes it."""

    newest = NEWEST

    def do_GET(self) -> None:  # the base class's name
        revision = self.path.partition("/api/datasets/org/data")[2].removeprefix("/revision/")
        known = self.path.startswith("/api/datasets/org/data") and revision in ("", OLDER)
        card = {"license": "cc-by-4.0" if revision else ["mit", "cc0-1.0"]}
        body = json.dumps({"id": "org/data", "sha": revision or self.newest, "cardData": card})
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body.encode() if known else b"{}")

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # as it may be where it was imported
    monkeypatch.setattr(Hub, "newest", NEWEST)
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_dataset_is_read_at_the_commit_that_is_recorded(hub: type[Hub], tmp_path: Path) -> None:
    bare, older = "hf://org/data@en:train", f"hf://org/data:train#revision={OLDER}"
    assert origin_of(bare) == Origin("mit, cc0-1.0", NEWEST)
    assert origin_of(older) == Origin("cc-by-4.0", OLDER)
    assert origin_of(f"{bare}#licence=of my own") == Origin("of my own", NEWEST)
    assert pinned(bare, origin_of(bare)) == f"{bare}#revision={NEWEST}"
    assert pinned(f"{bare}#name=x", origin_of(bare)) == f"{bare}#name=x&revision={NEWEST}"
    assert pinned(older, origin_of(older)) == older

    found = origins_of([bare, older], tmp_path / "origins.json")
    hub.newest = "c" * 40
    assert origins_of([bare, older], tmp_path / "origins.json") == found  # goes on with the same
    assert origin_of(bare).commit == hub.newest
    with pytest.raises(RecipeError, match="could not read dataset 'org/none' from the"):
        origin_of("hf://org/none:train")


def test_what_is_not_on_a_hub_has_the_licence_that_is_given(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text")
    assert origin_of(str(file)) == Origin()
    assert origin_of(f"{file}#name=a&licence=public domain") == Origin("public domain")
    assert origin_of(f"hf://{tmp_path}:train") == Origin()
    assert pinned(str(file), Origin("x")) == str(file)
