"""Starts a real Docker with one image, whose containers run this machine's programs and Python."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from recipes.core.processes import die_with_parent

IMAGE = "tests:1"
GROUP = 4300
"""The group whose members may use this Docker."""


def mounts() -> list[str]:
    """Returns the folders that containers need besides the image, which is almost empty."""
    folders = {Path("/usr"), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    return [f"{folder}:ro" for folder in sorted(folders)]


class Docker:
    """The client of a Docker with all files in one directory.

    The directory's path must be short, since the directory contains Unix sockets.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.host = f"unix://{directory}/docker.sock"

    @classmethod
    @contextlib.contextmanager
    def running(cls) -> Iterator[Docker | str]:
        """Starts the daemon and makes the image; yields a message if containers cannot run."""
        directory = Path(tempfile.mkdtemp(prefix="docker"))
        directory.chmod(0o755)
        docker = cls(directory)
        files = {"data-root": "data", "exec-root": "exec", "pidfile": "pid"}
        options = [f"--{name}={directory / file}" for name, file in files.items()]
        # Without a bridge, the daemon does not change the machine's network.
        options += ["--bridge=none", "--iptables=false", "--ip6tables=false"]
        options += [f"--host={docker.host}", f"--group={GROUP}", "--storage-driver=vfs"]
        with (directory / "log").open("w") as log:
            daemon = subprocess.Popen(
                ["dockerd", *options],
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
                start_new_session=True,
            )
        try:
            yield docker._problem(daemon) or docker
        finally:
            for name in docker.containers():
                docker.run("rm", "--force", name)
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(60)
            shutil.rmtree(directory, ignore_errors=True)

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Runs a command of the client."""
        command = ["docker", "--host", self.host, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def containers(self, *options: str) -> list[str]:
        """Returns the names of all containers."""
        return self.run("ps", "--all", "--format={{.Names}}", *options).stdout.split()

    def _problem(self, daemon: subprocess.Popen[bytes]) -> str | None:
        """Waits for the daemon, makes the image and starts a container; returns why one failed."""
        deadline = time.monotonic() + 60
        while self.run("version").returncode:
            if daemon.poll() is not None or time.monotonic() > deadline:
                lines = (self._directory / "log").read_text().splitlines()
                return f"no Docker can run here: {lines[-1:]}"
            time.sleep(0.1)
        root = self._directory / "image.tar"
        _write_root(root)
        path = f"PATH={sys.prefix}/bin:/usr/bin"
        volumes = [f"--volume={mount.removesuffix(':ro')}:{mount}" for mount in mounts()]
        for command in (
            ("import", f"--change=ENV {path}", root, IMAGE),
            ("run", "--rm", *volumes, IMAGE, "python", "-c", "pass"),
        ):
            done = self.run(*command)
            if done.returncode:
                return f"Docker cannot run containers here: {done.stderr.strip()}"
        return None


def _write_root(file: Path) -> None:
    """Writes the image's files: links to the folders of ``/usr``, and a folder for all users."""
    with tarfile.open(file, "w") as tar:
        for name in ("bin", "lib", "lib64"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
            tar.addfile(link)
        folder = tarfile.TarInfo("tmp")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o1777
        tar.addfile(folder)
