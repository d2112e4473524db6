"""Spawns two processes by MPI, as TensorRT-LLM's executor does; prints their ranks as a list.

Debian's Python runs this file. ``tests/install_slurm.sh`` installs mpi4py and Open MPI for it.
"""

from mpi4py import MPI
from mpi4py.futures import MPIPoolExecutor


def rank(_task: int) -> int:
    """Returns this process's rank among the spawned processes."""
    return int(MPI.COMM_WORLD.Get_rank())


if __name__ == "__main__":
    with MPIPoolExecutor(max_workers=2) as pool:
        # More tasks than processes, so that each process gets some.
        print(sorted(set(pool.map(rank, range(8)))))
