"""A local server that replaces the Hugging Face hub, for models and datasets.

The server has the endpoints that ``huggingface_hub`` calls in ``hf_api.py``, ``_commit_api.py``,
``lfs.py`` and ``file_download.py``:

- For models, which need a token: whoami, info, download of a file or of a range of its bytes,
  create, preupload, LFS, commit.
- For datasets, which need no token: info, list of a commit's files, download of a file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote

from tests.support.forked import run_forked

IMPORTS = ("filelock", "nemo_convert.preflight", "requests", "tqdm.asyncio", "yaml")
"""Modules that ``run_with_hub`` imports once. None of them imports ``huggingface_hub``."""


@dataclass
class FakeHub:
    """Contents of the hub, and a record of its downloads."""

    token: str
    """The only token that the hub accepts."""
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by model (``OWNER/NAME``) and path."""
    private: dict[str, bool] = field(default_factory=dict)
    """Whether a model is private, by model."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256. They are uploaded first; a commit then assigns paths to them."""
    commits: list[str] = field(default_factory=list)
    """Messages of all commits of models. Their number serves as the hash of the newest commit."""
    datasets: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Files by dataset, commit and path. The last commit is the newest."""
    downloads: list[tuple[str, int]] = field(default_factory=list)
    """Path and number of bytes of each file, or range of a file, that was downloaded."""
    serves_ranges: bool = True
    """Whether the hub sends only the requested range of a file; otherwise the whole file."""
    url: str = ""
    """Address of the server, such as ``http://127.0.0.1:8000``."""

    def downloaded_bytes(self, path: str) -> int:
        """Returns the number of bytes that were downloaded from the files with this path."""
        return sum(size for name, size in self.downloads if name == path)


@contextmanager
def fake_hub(token: str) -> Iterator[FakeHub]:
    """Runs a hub that accepts one token, until the ``with`` block ends."""
    new_hub = FakeHub(token)

    class Handler(_Handler):
        hub = new_hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    new_hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    # The argument is the number of seconds between checks for a shutdown.
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield new_hub
    finally:
        server.shutdown()
        server.server_close()


def settings_for(hub: FakeHub, home: Path) -> dict[str, str]:
    """Returns environment variables that make a new process use this hub.

    Libraries read them when they are imported.

    Args:
        hub: The hub.
        home: Folder for the cache and the settings of ``huggingface_hub``.
    """
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",  # this server has no Xet, the newer protocol for large files
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
    }


def run_with_hub(hub: FakeHub, home: Path, code: str) -> str:
    """Runs Python code in a process that uses the hub; returns the process's standard output."""
    home.mkdir(exist_ok=True)
    (home / "code.py").write_text(code)
    env = {**os.environ, **settings_for(hub, home)}
    process = run_forked(IMPORTS, [str(home / "code.py")], env, home)
    assert process.returncode == 0, process.stderr
    return process.stdout


DATASET_PATH = re.compile(
    r"(/api)?/datasets/(?P<name>[^/]+/[^/]+)(/(?P<endpoint>revision|tree|paths-info|resolve)/"
    r"(?P<revision>[^/]+)(/(?P<path>.+))?)?"
)
"""Path of a request about a dataset: info (``revision`` or no endpoint), files or one file."""
MODEL_FILE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
"""Path of a download of a model's file."""


class _Handler(BaseHTTPRequestHandler):
    """Serves the endpoints of ``hub``."""

    hub: FakeHub

    def log_message(self, *args: Any) -> None:
        """Logs nothing."""

    def _body(self) -> bytes:
        """Reads the request's body."""
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        """Sends ``content`` as JSON. In the names of headers, "_" represents "-"."""
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _is_authorized(self) -> bool:
        """Returns whether the request has the hub's token. If not, answers with status 401."""
        if self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self._body()  # an unread body would reset the connection
        self._answer({"error": "Invalid credentials"}, 401)
        return False

    def _dataset(self) -> bool:
        """Answers a request about a dataset; returns ``False`` for other requests."""
        match = DATASET_PATH.fullmatch(unquote(self.path.partition("?")[0]))
        if match is None:
            return False
        commits = self.hub.datasets.get(match["name"])
        revision = match["revision"] or "main"
        if commits is None:
            self._answer({}, 404, X_Error_Code="RepoNotFound")
        elif revision != "main" and revision not in commits:
            self._answer({}, 404, X_Error_Code="RevisionNotFound")
        else:
            commit = list(commits)[-1] if revision == "main" else revision
            self._dataset_commit(match, commit, commits[commit])
        return True

    def _dataset_commit(self, match: re.Match[str], commit: str, files: dict[str, bytes]) -> None:
        """Answers a request that matches ``DATASET_PATH``, about a commit with these files."""
        file_infos = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]
        if match["endpoint"] == "tree":
            self._answer(file_infos)
        elif match["endpoint"] == "paths-info":
            paths = parse_qs(self._body().decode()).get("paths", [])  # the body is a form
            self._answer([info for info in file_infos if info["path"] in paths])
        elif match["endpoint"] == "resolve":
            self._file(files, match["path"], commit)
        else:
            card = {"license": "cc0-1.0"}
            self._answer({"id": match["name"], "sha": commit, "siblings": [], "cardData": card})

    def _file(self, files: dict[str, bytes], path: str, commit: str) -> None:
        """Sends a file of a commit, or the requested range of its bytes; a HEAD gets no bytes."""
        if (data := files.get(path)) is None:
            self._answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        bytes_range = (self.hub.serves_ranges and self.headers.get("Range")) or ""
        first_and_last = re.fullmatch(r"bytes=(\d+)-(\d*)", bytes_range)
        self.send_response(206 if first_and_last else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        if first_and_last:
            first, last = first_and_last.groups()
            end = int(last) + 1 if last else None  # a range without a last byte is open
            data = data[int(first) : end]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.hub.downloads.append((path, len(data)))
            self.wfile.write(data)

    def _model_file(self) -> bool:
        """Answers a request for a model's file; returns ``False`` for other requests."""
        match = MODEL_FILE.fullmatch(unquote(self.path))
        if match is None or match["name"] not in self.hub.models:
            return False
        self._file(self.hub.models[match["name"]], match["path"], str(len(self.hub.commits)))
        return True

    def do_HEAD(self) -> None:
        if not self._dataset() and self._is_authorized() and not self._model_file():
            self._answer({}, 404, X_Error_Code="RepoNotFound")

    def do_GET(self) -> None:
        if self._dataset() or not self._is_authorized() or self._model_file():
            return
        hub = self.hub
        # The path of an info request is /api/models/NAME or /api/models/NAME/revision/REVISION.
        name = self.path.removeprefix("/api/models/").split("/revision/")[0]
        if self.path == "/api/whoami-v2":
            self._answer({"name": "me", "type": "user"})
        elif name in hub.models:
            page = {"id": name, "sha": str(len(hub.commits)), "tags": []}
            siblings = [{"rfilename": path} for path in hub.models[name]]
            self._answer({**page, "private": hub.private.get(name), "siblings": siblings})
        else:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_PUT(self) -> None:
        """Stores a large file that is uploaded to the address from ``_lfs_object``."""
        data = self._body()
        self.hub.blobs[hashlib.sha256(data).hexdigest()] = data
        self._answer({})

    def do_POST(self) -> None:
        if self._dataset() or not self._is_authorized():
            return
        body, hub = self._body(), self.hub
        if self.path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}"
            exists = name in hub.models
            hub.models.setdefault(name, {})
            hub.private.setdefault(name, request["private"])
            self._answer({"url": f"{hub.url}/{name}"}, 409 if exists else 200)
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            self._answer({"files": [self._preupload(f) for f in json.loads(body)["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer({"objects": [self._lfs_object(o) for o in json.loads(body)["objects"]]})
        else:
            self._commit([json.loads(line) for line in body.splitlines()])

    def _preupload(self, file: dict[str, Any]) -> dict[str, Any]:
        """Returns how a file must be uploaded: by LFS, or in the commit."""
        is_large = file["path"].endswith(".safetensors")
        mode = "lfs" if is_large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _lfs_object(self, blob: dict[str, Any]) -> dict[str, Any]:
        """Describes a large file, with an upload address if the hub does not have the file."""
        if blob["oid"] in self.hub.blobs:  # oid: the SHA-256
            return dict(blob)
        actions = {"upload": {"href": f"{self.hub.url}/upload/{blob['oid']}"}}
        return {**blob, "actions": actions}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        """Applies a commit to a model. A line is the message, or adds or deletes one file."""
        name = self.path.removeprefix("/api/models/").split("/commit/")[0]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif line["key"] == "file":
                self.hub.models[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.models[name][value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.hub.models[name][value["path"]]
        self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/1", "commitOid": "1"})
