"""Server that imports the libraries once, then forks a child process for each stage.

This saves each stage 10 s of imports. A caller starts the server (``fork_server``), starts children
(``fork_module``), and waits for each (``watch_child``).

multiprocessing's forkserver is not used, because its children would import the caller's
``__main__``, inherit the server's environment instead of the caller's, and outlive the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from recipes.core.processes import (
    death_message,
    die_with_parent,
    prepare_imports,
    sigterm_ignored,
)

STARTED, ENDED = b"s", b"e"
"""Messages of the server: a child has started or has ended. ``STARTED`` carries its pidfd."""
IMPORT_ENVIRONMENT = {
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "NUMEXPR_NUM_THREADS": "1",
    # Otherwise torch.cuda.is_available() initialises CUDA, which does not survive a fork.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
"""Environment variables of the server, not of children. They keep imports from starting threads or
CUDA, which do not survive a fork."""
MAX_REQUEST_BYTES = 65536
"""A longer request would be truncated. A request has a few paths of at most 4,096 bytes each."""
STOP_SECONDS = 30
"""Maximum wait for a child to end after SIGTERM."""


@contextmanager
def fork_server(
    modules: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[socket.socket]:
    """Starts a server and yields a socket to it, without waiting for the server's imports.

    After the ``with`` block, waits until the server and its child have ended. If the block fails or
    this process dies, the server and its child are killed.

    Args:
        modules: Modules that the server imports before it forks.
        environment: All environment variables of the children.
        log: File for the output of the imports, and for the reason if the server cannot fork.
    """
    client, server = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with client, log.open("wb") as output:
        with server:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(server.fileno()), *modules],
                pass_fds=[server.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent,
            )
        try:
            yield client
        except BaseException:
            process.kill()
            raise
        finally:
            client.close()
            process.wait()


def fork_module(
    server: socket.socket, module: str, arguments: Sequence[str], log: IO[bytes]
) -> int | None:
    """Starts ``python -m MODULE ARGUMENTS`` in a child of the server, after the server's imports.

    The child's output goes to ``log``. A server has one child at a time. Returns the child's pidfd,
    for ``watch_child``; ``None`` if the server cannot fork.
    """
    request = json.dumps([module, *arguments]).encode()
    try:
        socket.send_fds(server, [request], [log.fileno()])
        message = ENDED
        while message == ENDED:  # skips an unread message about an earlier child's end
            message, pidfds, _, _ = socket.recv_fds(server, 1, 1)
    except ConnectionError:
        return None
    return pidfds[0] if pidfds else None


@contextmanager
def watch_child(server: socket.socket, pidfd: int, log: IO[bytes]) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether the child has ended. Closes the pidfd after the block.

    If the block fails, terminates the child. If the server dies, ``log`` says so.
    """
    ended = False

    def has_ended(timeout: float = 0) -> bool:
        """Waits up to ``timeout`` seconds for the child's end."""
        nonlocal ended
        if ended or not select.select([pidfd], [], [], timeout)[0]:
            return ended
        ended = True
        with contextlib.suppress(ConnectionError):
            if server.recv(1):  # ENDED: the server is alive and has logged how the child ended
                return True
        # The server died, and the child died with it (``die_with_parent``).
        log.write(b"killed with the process that it was forked from\n")
        log.flush()
        return True

    try:
        yield has_ended
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        with sigterm_ignored():
            has_ended(STOP_SECONDS)
        raise
    finally:
        os.close(pidfd)


def main() -> None:
    """Imports modules, then forks a child per request until the client closes its socket.

    The arguments of the command are the descriptor of the server's socket and the modules.
    """
    server = socket.socket(fileno=int(sys.argv[1]))
    server.set_inheritable(False)
    environment = dict(os.environ)
    os.environ |= IMPORT_ENVIRONMENT
    # Only the child handles Ctrl-C.
    previous_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare_imports()
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # the garbage collector of children skips the imported objects
    _require_forkable()

    def run_request(request: bytes, log: int) -> None:
        server.close()
        signal.signal(signal.SIGINT, previous_handler)
        os.environ.clear()
        os.environ.update(environment)
        _run_module(json.loads(request), log)

    while True:
        request, log_fds, _, _ = socket.recv_fds(server, MAX_REQUEST_BYTES, 1)
        if not request:
            return
        _flush_c_streams()
        # Children of multiprocessing skip the atexit handlers that imports registered.
        child = multiprocessing.get_context("fork").Process(
            target=run_request, args=(request, *log_fds)
        )
        child.start()
        pidfd = os.pidfd_open(child.pid)  # type: ignore[arg-type]
        socket.send_fds(server, [STARTED], [pidfd])
        os.close(pidfd)
        child.join()
        # With a descriptor, ``open`` does not truncate the file. The end of the block closes it.
        with open(log_fds[0], "w", encoding="utf-8") as log:
            if message := death_message(child.exitcode):
                log.write(f"{message}\n")
        server.send(ENDED)


def _require_forkable() -> None:
    """Exits this process with a message if an import has started threads or CUDA.

    A trial child asks torch whether CUDA was initialised before the fork. OpenBLAS ends its threads
    at the trial fork and restarts them when needed, so they are not counted.
    """
    torch: Any = sys.modules.get("torch")
    pid = os.fork()
    if pid == 0:
        os._exit(torch is not None and torch.cuda._is_in_bad_fork())
    exit_status = os.waitpid(pid, 0)[1]  # not 0 if the child's torch cannot use CUDA
    # Without a GPU, a child of a CUDA build of torch can never use CUDA: its status says nothing.
    if exit_status and torch.cuda.is_available():
        sys.exit("not forked: an import has initialised CUDA")
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        sys.exit(f"not forked: imports have started {threads - 1} threads, which a fork would lose")


def _run_module(command: list[str], log: int) -> None:
    """Runs ``python -m COMMAND`` in this process, with the command's output in a log.

    ``log`` is the log's file descriptor, which this function closes.
    """
    die_with_parent()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.argv = command
    sys.orig_argv = [sys.executable, "-m", *command]
    # Without new seeds all children would draw the same random numbers. Python itself reseeds
    # ``random`` after a fork.
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        _flush_c_streams()


def _flush_c_streams() -> None:
    """Flushes C's output buffers: a fork copies them, and a child never flushes them at its end."""
    ctypes.CDLL(None).fflush(None)


if __name__ == "__main__":
    main()
