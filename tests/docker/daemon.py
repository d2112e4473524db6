"""Starts a Docker daemon with one image. Its containers run this machine's programs and Python."""

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
"""Name and tag of the image."""
GROUP = 4300
"""ID of the group whose members may use the daemon."""


def mounts() -> list[str]:
    """Returns the folders of this machine that containers need, as ``PATH:ro`` (read-only).

    The image itself is almost empty. Containers see a folder at its path on this machine.
    """
    folders = {Path("/usr"), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    return [f"{folder}:ro" for folder in sorted(folders)]


class Docker:
    """The client of a Docker daemon that keeps all its files in one directory.

    The directory's path must be short, since it is part of the paths of Unix sockets. These have at
    most 107 characters.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.host = f"unix://{directory}/docker.sock"

    @classmethod
    @contextlib.contextmanager
    def running(cls) -> Iterator[Docker | str]:
        """Starts the daemon and imports the image; stops the daemon at exit.

        Yields:
            The client, or a message that says why containers cannot run.
        """
        directory = Path(tempfile.mkdtemp(prefix="docker"))
        directory.chmod(0o755)  # so that other users reach the daemon's socket
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
            yield docker._set_up(daemon) or docker
        finally:
            for name in docker.containers():
                docker.run("rm", "--force", name)
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(60)
            shutil.rmtree(directory, ignore_errors=True)

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Runs a command of the client, such as ``("ps", "--all")``; does not check its status."""
        command = ["docker", "--host", self.host, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def containers(self, *options: str) -> list[str]:
        """Returns the names of all containers, also stopped ones, that match options of ``ps``."""
        return self.run("ps", "--all", "--format={{.Names}}", *options).stdout.split()

    def _set_up(self, daemon: subprocess.Popen[bytes]) -> str | None:
        """Waits for the daemon, imports the image and runs a container once.

        Returns:
            A message that says which of these failed and why; ``None`` if all succeeded.
        """
        deadline = time.monotonic() + 60  # seconds
        while self.run("version").returncode:
            if daemon.poll() is not None or time.monotonic() > deadline:
                lines = (self._directory / "log").read_text().splitlines()
                return f"the Docker daemon did not start; end of its log: {lines[-1:]}"
            time.sleep(0.1)
        image = self._directory / "image.tar"
        _write_image(image)
        path = f"PATH={sys.prefix}/bin:/usr/bin"
        volumes = [f"--volume={mount.removesuffix(':ro')}:{mount}" for mount in mounts()]
        for command in (
            ("import", f"--change=ENV {path}", image, IMAGE),
            ("run", "--rm", *volumes, IMAGE, "python", "-c", "pass"),
        ):
            completed = self.run(*command)
            if completed.returncode:
                return f"docker {command[0]} failed: {completed.stderr.strip()}"
        return None


def _write_image(file: Path) -> None:
    """Writes the image's root directory as a tar file.

    It has symbolic links into ``/usr``, which is mounted, and a ``/tmp`` that all users may write.
    """
    with tarfile.open(file, "w") as tar:
        for name in ("bin", "lib", "lib64"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
            tar.addfile(link)
        folder = tarfile.TarInfo("tmp")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o1777
        tar.addfile(folder)
