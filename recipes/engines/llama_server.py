"""Runs llama.cpp's server from the package xllamacpp.

``server.llama_command`` starts this module if there is no program ``llama-server``. The module
accepts the options of ``llama-server`` that ``llama_command`` sets.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path


def main() -> None:
    """Serves a GGUF file until the process is ended."""
    import xllamacpp

    parser = argparse.ArgumentParser()
    parser.add_argument("-m", type=Path, required=True)
    parser.add_argument("--host", required=True)
    for option in ("--port", "-c", "-np", "-t"):
        parser.add_argument(option, type=int, required=True)
    args = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames, params.port = str(args.m), [args.host], args.port
    params.n_ctx, params.n_parallel, params.warmup = args.c, args.np, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.t
    server = xllamacpp.Server(params)  # the server stops when this object is deleted
    print(f"llama.cpp serves {args.m} at {server.listening_address}", flush=True)
    signal.pause()  # the server runs in other threads until a signal ends the process


if __name__ == "__main__":
    main()
