"""A process that has imported the stack and becomes a stage by a fork, in no time instead of 10 s.

It is not multiprocessing's forkserver: that one has its caller's environment, imports its caller's
``__main__`` into every child, and its children outlive it.
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

from recipes.core.processes import die_with_parent, ended_by, expect_no_gpu, leave_out_trackers

BEGUN, ENDED = b"b", b"e"
"""What the process says of a stage, with a descriptor of it first."""
WHILE_IMPORTING = {
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "NUMEXPR_NUM_THREADS": "1",
    # Else torch.cuda.is_available() initialises CUDA, which does not survive a fork.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
"""Keeps imports from starting what a fork would lose; a stage does not see it."""


@contextmanager
def preloaded(
    modules: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[socket.socket]:
    """Starts the process, and does not wait for its imports; yields what ``fork_stage`` needs.

    However the caller ends, the process ends, and the stage that it has become. ``environment`` is
    all that both see; ``log`` gets what imports say, and why the process cannot be forked if so.
    """
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with ours, log.open("wb") as output:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent,
            )
        try:
            yield ours
        except BaseException:
            process.kill()
            raise
        finally:
            ours.close()
            process.wait()


def fork_stage(server: socket.socket, module: str, config: Path, log: IO[bytes]) -> int | None:
    """Starts a stage, which writes to ``log``, once the imports are done; one at a time.

    Returns a file descriptor of the process; ``None`` if the process cannot be forked.
    """
    request = json.dumps([module, str(config)]).encode()
    try:
        socket.send_fds(server, [request], [log.fileno()])
        said, descriptors, _, _ = socket.recv_fds(server, 1, 1)
        while said == ENDED:  # of an earlier stage, for whose end nobody has asked
            said, descriptors, _, _ = socket.recv_fds(server, 1, 1)
    except ConnectionError:
        return None
    return descriptors[0] if descriptors else None


@contextmanager
def followed(server: socket.socket, process: int, log: IO[bytes]) -> Iterator[Callable[[], bool]]:
    """Yields what tells whether the process of a file descriptor, which is closed, has ended.

    The process is stopped if the caller fails. How it was killed, the log says for it.
    """
    told = False

    def ended(seconds: float = 0) -> bool:
        nonlocal told
        if told or not select.select([process], [], [], seconds)[0]:
            return told
        told = True
        with contextlib.suppress(ConnectionError):
            if server.recv(1):  # once its log has how it ended
                return True
        log.write(b"killed with the process that it was forked from\n")
        log.flush()
        return True

    try:
        yield ended
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGTERM)
        ended(seconds=30)
        raise
    finally:
        os.close(process)


def main() -> None:
    """Imports, and forks on request until nobody can ask any more."""
    server = socket.socket(fileno=int(sys.argv[1]))
    server.set_inheritable(False)
    environment = dict(os.environ)
    os.environ |= WHILE_IMPORTING
    # Ctrl-C is for the stage; without it, the launcher ends this process.
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_out_trackers()
    expect_no_gpu()
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # what was imported stays: no stage has to look through it for garbage
    _require_forkable()
    while True:
        request, descriptors, _, _ = socket.recv_fds(server, 4096, 1)
        if not request:
            return

        def become(request: bytes = request, log: int = descriptors[0]) -> None:
            server.close()
            signal.signal(signal.SIGINT, on_interrupt)
            os.environ.clear()
            os.environ.update(environment)
            module, config = json.loads(request)
            _become(module, config, log)

        _flush_c()
        # Ends as a stage must: with its own exit functions and not with those of the imports.
        stage = multiprocessing.get_context("fork").Process(target=become)
        stage.start()
        process = os.pidfd_open(stage.pid)  # type: ignore[arg-type]
        socket.send_fds(server, [BEGUN], [process])
        os.close(process)
        stage.join()
        with open(descriptors[0], "w", encoding="utf-8") as end:
            end.write(f"{said}\n" if (said := ended_by(stage.exitcode)) else "")
        server.send(ENDED)


def _require_forkable() -> None:
    """Forks once, which also makes OpenBLAS end its threads until they are needed again.

    Where there is no GPU, a CUDA build of torch has only looked for one, and nothing is lost.
    """
    torch: Any = sys.modules.get("torch")
    pid = os.fork()
    if pid == 0:
        os._exit(torch is not None and torch.cuda._is_in_bad_fork())
    if os.waitpid(pid, 0)[1] and torch.cuda.is_available():
        sys.exit("not forked: an import has initialised CUDA")
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        sys.exit(f"not forked: imports have started {threads - 1} threads, which a fork would lose")


def _become(module: str, config: str, log: int) -> None:
    """Runs a stage as ``python -m MODULE --config CONFIG`` does."""
    die_with_parent()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    arguments = ["--config", config]
    sys.argv = [module, *arguments]
    sys.orig_argv = [sys.executable, "-m", module, *arguments]
    _seed_anew()
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        _flush_c()


def _seed_anew() -> None:
    """Gives each stage random numbers of its own; Python's generator sees to that by itself."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()


def _flush_c() -> None:
    """What C code has printed is lost at the end of a fork, or written by each."""
    ctypes.CDLL(None).fflush(None)


if __name__ == "__main__":
    main()
