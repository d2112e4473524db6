"""Replaces the Python of Slurm jobs: ranks record their environment instead of running a stage.

The setting ``cluster.python`` names a script that starts this file, so the launcher's job scripts
run unchanged. All ranks of a stage compute the sum of their rank numbers. Then the real worker
(``recipes.core.worker``) completes the stage, without the stage's own work.

- Without ``PROBE_TORCH`` in the environment, forks replace torchrun's processes. Ranks communicate
  through sockets, and only rank 0 runs the worker: 768 ranks that import torch would take 150 GB.
- With ``PROBE_TORCH`` the real torchrun starts the ranks. Each rank runs the worker, and ranks
  communicate by gloo.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

TORCH = "PROBE_TORCH"
"""Environment variable. If it is set, the real torchrun starts the ranks."""
HOLD = "PROBE_HOLD"
"""Environment variable with the number of a training step. Distillation reports this step as done,
then waits to be killed."""
PROBE = "PROBE"
"""Environment variable with the path of the script that starts this file."""
RECORDS = "probe"
"""Folder in a stage's directory, with a JSON file for each rank."""
TRAINING = "training"
"""Folder in the directory of a search stage, for a training run that the search starts."""
DISTILL = "recipes.stages.distill"
SEARCH = "recipes.stages.successive_halving"
TIMEOUT_SECONDS = 120
"""Maximum wait for other ranks, or to be killed."""
DEBIAN_PYTHON = "/usr/bin/python3"
"""The interpreter that has mpi4py."""


def main(arguments: list[str]) -> None:
    """Runs a job's command line ``[-u] -m MODULE ARGUMENT...``: one rank, or torchrun."""
    module, *rest = arguments[arguments.index("-m") + 1 :]
    if module == "recipes.core.worker":
        run_rank(*rest)
        return
    assert module == "torch.distributed.run"
    if TORCH not in os.environ:
        fork_ranks(rest)
    os.environ["PYTHON_EXEC"] = os.environ[PROBE]  # torchrun starts ranks with this interpreter
    os.execv(sys.executable, [sys.executable, "-m", module, *rest])


def fork_ranks(torchrun_arguments: list[str]) -> NoReturn:
    """Forks the ranks of a node with the variables that torchrun sets; exits after them."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option in ("--nnodes", "--nproc-per-node", "--node-rank", "--master-port"):
        parser.add_argument(option, type=int, required=True)
    for option in ("--master-addr", "--rdzv-conf"):
        parser.add_argument(option, required=True)
    parser.add_argument("-m", dest="module", required=True)
    options, arguments = parser.parse_known_args(torchrun_arguments)
    for local_rank in range(options.nproc_per_node):
        if os.fork() == 0:
            os.environ |= {
                "RANK": str(options.node_rank * options.nproc_per_node + local_rank),
                "LOCAL_RANK": str(local_rank),
                "GROUP_RANK": str(options.node_rank),
                "WORLD_SIZE": str(options.nnodes * options.nproc_per_node),
                "LOCAL_WORLD_SIZE": str(options.nproc_per_node),
                "MASTER_ADDR": options.master_addr,
                "MASTER_PORT": str(options.master_port),
            }
            run_rank(*arguments)
            os._exit(0)
    statuses = [os.wait()[1] for _ in range(options.nproc_per_node)]  # 0 if a rank succeeded
    sys.exit(any(statuses))


def run_rank(module: str, request: str) -> None:
    """Sums the rank numbers, records this rank, and completes the stage.

    Args:
        module: Module of the stage.
        request: The stage's ``config.yaml``, as the worker gets it.
    """
    stage_dir = Path(request).parent
    records = stage_dir / RECORDS
    records.mkdir(exist_ok=True)
    sys.argv = [__file__, module, request]
    if TORCH in os.environ and "RANK" in os.environ:
        run_worker(module, lambda: write_record(records, sum_by_gloo()))
        return
    write_record(records, sum_by_socket(records))
    if rank() == 0:
        os.environ["WORLD_SIZE"] = "1"  # no other rank runs the worker
        run_worker(module, lambda: None)


def run_worker(module: str, work: Callable[[], None]) -> None:
    """Runs the real worker, with ``work`` in place of the stage's own function.

    If the stage is a search, it also starts one of its training runs as a child process.
    """
    # Makes ``tests.support`` importable. The run's snapshot of ``recipes`` is earlier in the list.
    sys.path.insert(2, str(Path(__file__).parents[2]))
    from recipes.core import worker
    from recipes.core.manifest import Outcome
    from recipes.core.stage import NEEDS_GPU, metrics_log
    from recipes.stages.contract import Stage
    from tests.support.results import RESULTS

    os.environ.pop(NEEDS_GPU, None)  # the GPUs of these nodes are only files
    stage: Stage[Any] = importlib.import_module(module).STAGE

    def run(config: Any, inputs: object, out: Path) -> Outcome:
        work()
        if module == DISTILL and HOLD in os.environ:
            metrics_log(out).progress("distill", int(os.environ[HOLD]), config.max_steps)
            time.sleep(TIMEOUT_SECONDS)
        if module == SEARCH:
            from recipes.core.stage_process import run_child
            from recipes.stages.successive_halving import training_of

            sys.executable = os.environ[PROBE]  # this file also runs the ranks of the training
            training = training_of(config, config.round_sizes(config.max_candidates()), 0)
            run_child(training, out.parent.parent / TRAINING, {})
        return Outcome(RESULTS.get(config.stage))  # later plans of the run read this result

    object.__setattr__(stage, "run", run)  # the dataclass is frozen
    worker.main()


def rank() -> int:
    """Returns the rank in the job; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def write_record(records: Path, total: int) -> None:
    """Writes ``RANK.json`` with this rank's environment variables and further values.

    - ``total``: the sum of the rank numbers.
    - ``affinity``: the cores that the rank may use.
    - ``spawned``, if the stage starts programs with mpirun: the output of ``spawn.py``, run twice.
    - ``step``, only of rank 0: what Slurm says about the job step.
    """

    def output_of(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    values: dict[str, Any] = {**os.environ, "total": total}
    values["affinity"] = sorted(os.sched_getaffinity(0))
    if mpirun := os.environ.get("TENSORRT_LLM_LAUNCHER", "").split():
        spawn = (DEBIAN_PYTHON, str(Path(__file__).with_name("spawn.py")))
        values["spawned"] = output_of(*mpirun, *spawn) + output_of(*mpirun, *spawn)
    job = os.environ.get("SLURM_JOB_ID")
    if rank() == 0 and job:
        step = f"{job}.{os.environ['SLURM_STEP_ID']}"
        values["step"] = output_of("scontrol", "--oneliner", "show", "step", step)
    (records / f"{rank()}.json").write_text(json.dumps(values))


def sum_by_gloo() -> int:
    """Returns the sum of all rank numbers; ranks communicate by torch's gloo backend."""
    import torch

    torch.distributed.init_process_group("gloo")
    total = torch.tensor(rank())
    torch.distributed.all_reduce(total)
    return int(total)


def sum_by_socket(records: Path) -> int:
    """Returns the sum of all rank numbers; ranks connect to rank 0 at ``MASTER_ADDR``.

    Rank 0 writes its port to a file in ``records``, which all nodes can read.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return 0
    address, port_file = os.environ["MASTER_ADDR"], records / f"port-{os.environ['SLURM_JOB_ID']}"
    if rank() == 0:
        # Port 0: the system chooses a free port.
        with socket.create_server((address, 0), backlog=world_size) as server:
            server.settimeout(TIMEOUT_SECONDS)
            temporary = port_file.with_suffix(".part")
            temporary.write_text(str(server.getsockname()[1]))
            temporary.rename(port_file)  # so that no rank reads an empty file
            connections = [server.accept()[0] for _ in range(world_size - 1)]
            total = sum(int(connection.recv(16)) for connection in connections)
            for connection in connections:
                connection.sendall(str(total).encode())
        return total
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not port_file.exists():
        assert time.monotonic() < deadline, "rank 0 did not start"
        time.sleep(0.2)
    port = int(port_file.read_text())
    with socket.create_connection((address, port), TIMEOUT_SECONDS) as connection:
        connection.sendall(str(rank()).encode())
        return int(connection.recv(16))


if __name__ == "__main__":
    main(sys.argv[1:])
