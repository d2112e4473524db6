"""Spawns two processes by MPI, as TensorRT-LLM's executor does, and prints their ranks.

Debian's Python runs this file. ``tests/install_slurm.sh`` installs mpi4py and Open MPI for it.
"""

from mpi4py import MPI
from mpi4py.futures import MPIPoolExecutor


def rank(_: int) -> int:
    """Returns this process's rank among the spawned processes."""
    return int(MPI.COMM_WORLD.Get_rank())


if __name__ == "__main__":
    with MPIPoolExecutor(max_workers=2) as pool:
        print(sorted(set(pool.map(rank, range(8)))))
