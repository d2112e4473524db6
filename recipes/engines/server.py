"""Starts and stops a server of a GGUF file or engine on this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from recipes.core.errors import RecipeError
from recipes.core.processes import death_message, die_with_parent
from recipes.engines import llama_server
from recipes.engines.tensorrt_llm import LLM_OPTIONS

HOST = "127.0.0.1"
LLAMA_SERVER = "llama-server"
POLL_SECONDS = 0.2
"""Time between two checks whether a server has started."""
STOP_SECONDS = 15
"""Time that a server has to end after SIGTERM, before it is killed."""
SEE_LOG = "its output is in the stage's log: python launch/run.py logs run_dir=DIR"
NO_LLAMA_SERVER = RecipeError(
    f"llama.cpp's server is missing: neither {LLAMA_SERVER} nor the package xllamacpp is installed",
    f"install this repository's dependencies again (make install), or put {LLAMA_SERVER} on PATH",
)


def has_llama_server() -> bool:
    """Returns whether this machine has llama.cpp's server, as a program or as a package."""
    return bool(shutil.which(LLAMA_SERVER) or importlib.util.find_spec("xllamacpp"))


def llama_command(file: Path, port: int, context: int, threads: int) -> list[str]:
    """Returns the command that serves a GGUF file, for one request at a time.

    Raises ``RecipeError`` if llama.cpp's server is not installed.
    """
    if not has_llama_server():
        raise NO_LLAMA_SERVER
    if shutil.which(LLAMA_SERVER):
        command = [LLAMA_SERVER]
    else:  # then the package xllamacpp is installed
        command = [sys.executable, "-m", llama_server.__name__]
    command += ["-m", str(file), "--host", HOST, "--port", str(port)]
    # -c: tokens of the context; -np: requests at a time; -t: CPU threads.
    return [*command, "-c", str(context), "-np", "1", "-t", str(threads)]


def trtllm_command(engine: str, backend: str, tokenizer: str, ranks: int = 1) -> list[str]:
    """Returns the command that serves the engine in a folder with TensorRT-LLM.

    An engine of the backend ``tensorrt_llm`` contains no tokenizer, so the command names the folder
    ``tokenizer``. For ``tensorrt_llm_pytorch``, the command has the number of ``ranks``, that is,
    of GPUs that share the engine.
    """
    command = ["trtllm-serve", engine]
    if backend == "tensorrt_llm":
        return [*command, "--backend", "tensorrt", "--tokenizer", tokenizer]
    parallel = ["--tp_size", str(ranks)] if ranks > 1 else []
    return [*command, *parallel, "--extra_llm_api_options", f"{engine}/{LLM_OPTIONS}"]


def free_port() -> int:
    """Returns a port of ``HOST`` that no process uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))  # 0: the system chooses a free port
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    command: Sequence[str], port: int, start_seconds: float, launcher: Sequence[str] = ()
) -> Iterator[str]:
    """Runs a server while the context is open; yields the server's address.

    The server is killed if this process dies. Also adds ``HOST`` to the environment variable
    ``no_proxy``, and leaves it there.

    Args:
        command: The server's program and options.
        port: Port that ``command`` makes the server listen on.
        start_seconds: Maximum time until the server is ready.
        launcher: Command that starts ``command``, such as mpirun with its options.

    Raises:
        RecipeError: The server is not installed, did not start in ``start_seconds``, or ended; or a
            request in the context failed.
    """
    import requests  # slow to import, and plans import this module

    name, address = Path(command[0]).name, f"http://{HOST}:{port}"
    # Otherwise requests to the server, also lm-eval's, would go to the proxy in ``http_proxy``.
    for variable in ("no_proxy", "NO_PROXY"):
        hosts = os.environ.get(variable)
        os.environ[variable] = f"{hosts},{HOST}" if hosts else HOST
    if shutil.which(command[0]) is None:
        raise RecipeError(
            f"{command[0]} is not installed",
            f"run this stage on a machine or in an image that has {command[0]} on PATH",
        )
    # The server may be a C++ program, so die_with_parent is called before the program starts.
    process = subprocess.Popen(
        [*launcher, *command], stdin=subprocess.DEVNULL, preexec_fn=die_with_parent
    )
    try:
        _wait_until_healthy(process, address, name, start_seconds)
        yield address
    except requests.RequestException as error:
        # A request can fail shortly before the process ends, so wait for one second.
        if reason := _exit_reason(process, wait=1):
            raise RecipeError(f"{name} ended during a request: {reason}", SEE_LOG) from error
        answer = getattr(error.response, "text", "")  # empty if there is no response
        raise RecipeError(f"{name} failed: {answer or error}", SEE_LOG) from error
    finally:
        process.terminate()
        if _exit_reason(process, wait=STOP_SECONDS) is None:
            process.kill()
            process.wait()


def _wait_until_healthy(
    process: subprocess.Popen[bytes], address: str, name: str, seconds: float
) -> None:
    """Waits until the server answers ``/health``; raises ``RecipeError`` if it ends or is late."""
    import requests

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if reason := _exit_reason(process, wait=POLL_SECONDS):
            raise RecipeError(f"{name} did not start: {reason}", SEE_LOG)
        try:
            if requests.get(f"{address}/health", timeout=10).ok:
                return
        except requests.RequestException:
            continue  # the server does not listen yet
    raise RecipeError(f"{name} did not start within {seconds:.0f} seconds", SEE_LOG)


def _exit_reason(process: subprocess.Popen[bytes], wait: float) -> str | None:
    """Returns how a process ended; ``None`` if it still runs after ``wait`` seconds."""
    try:
        status = process.wait(wait)
    except subprocess.TimeoutExpired:
        return None
    return death_message(status) or f"exit status {status}"
