"""Starts and stops a server for a built model on this machine."""

from __future__ import annotations

import importlib.util
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
STOP_SECONDS = 15
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

    Raises:
        RecipeError: llama.cpp's server is not installed.
    """
    if not has_llama_server():
        raise NO_LLAMA_SERVER
    program = [LLAMA_SERVER]
    if shutil.which(LLAMA_SERVER) is None:
        program = [sys.executable, "-m", llama_server.__name__]
    options = {"-m": file, "--host": HOST, "--port": port, "-c": context, "-np": 1, "-t": threads}
    return [*program, *(str(word) for option in options.items() for word in option)]


def trtllm_command(engine: str, backend: str, tokenizer: str, ranks: int = 1) -> list[str]:
    """Returns the command that serves an engine of TensorRT-LLM.

    Args:
        engine: The engine's folder.
        backend: The engine's backend.
        tokenizer: Hugging Face folder with the tokenizer, which a TensorRT engine does not contain.
        ranks: GPUs that share the engine. A TensorRT engine has this number in its config.
    """
    command = ["trtllm-serve", engine]
    if backend == "tensorrt_llm":
        return [*command, "--backend", "tensorrt", "--tokenizer", tokenizer]
    parallel = ["--tp_size", str(ranks)] if ranks > 1 else []
    return [*command, *parallel, "--extra_llm_api_options", f"{engine}/{LLM_OPTIONS}"]


def free_port() -> int:
    """Returns a port that no process uses."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def serving(
    command: Sequence[str], port: int, start_seconds: float, launcher: Sequence[str] = ()
) -> Iterator[str]:
    """Runs a server until the context ends; yields its address. The server dies with this process.

    ``launcher`` is a command, such as mpirun with its options, that starts the server.

    Raises:
        RecipeError: The server is missing, did not start in ``start_seconds``, ended, or refused a
            request.
    """
    import requests  # slow to import, and plans import this module

    name, address = Path(command[0]).name, f"http://{HOST}:{port}"
    if shutil.which(command[0]) is None:
        raise RecipeError(f"{command[0]} is not installed", "run this stage where it is installed")
    # preexec_fn calls die_with_parent for the server, which may be a program in C++.
    process = subprocess.Popen(
        [*launcher, *command], stdin=subprocess.DEVNULL, preexec_fn=die_with_parent
    )
    try:
        _wait_until_healthy(process, address, name, start_seconds)
        yield address
    except requests.RequestException as error:
        reason = _exit_reason(process, wait=1)  # a request may fail just before the process ends
        answer = getattr(error.response, "text", "") or error
        what = f"{name} ended during a request: {reason}" if reason else f"{name} failed: {answer}"
        raise RecipeError(what, SEE_LOG) from error
    finally:
        process.terminate()
        if _exit_reason(process, wait=STOP_SECONDS) is None:
            process.kill()
            process.wait()


def _wait_until_healthy(
    process: subprocess.Popen[bytes], address: str, name: str, seconds: float
) -> None:
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
