"""Starts a real Slurm for the tests: a controller and simulated nodes, all on this machine.

Each node is configured as a DGX H100: 8 GPUs, 224 CPUs and 2 TB of memory. A node's daemon needs
9 MB of this machine's memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

FIRST_PORT, BLOCKS, BLOCK_PORTS = 10000, 18, 500
"""A cluster uses one of 18 blocks of 500 ports from port 10000 on: see ``first_port_of_block``."""
NODES = 96
"""Number of simulated nodes: as many as the largest recipe needs."""
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.sock,cred_expire=15
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SrunPortRange={srun_first}-{srun_last}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=300
MpiDefault=none
SwitchType=switch/none
PlugStackConfig={dir}/plugstack.conf
KillWait=2
StateSaveLocation={dir}/state
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmdSpoolDir={dir}/slurmd.%n
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd.%n.log
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 \
Port=[{node_first}-{node_last}] Sockets=2 CoresPerSocket=56 ThreadsPerCore=2 \
RealMemory=2000000 Gres=gpu:8 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=1-00:00:00 DefaultTime=10 \
DefMemPerCPU=8900 State=UP
"""


class SlurmCluster:
    """A Slurm with all files in one directory.

    The directory's path must be short: it contains Unix sockets, whose paths Linux limits to 107
    bytes.
    """

    def __init__(self, directory: Path, nodes: int = NODES) -> None:
        self.directory = directory
        self._nodes = [f"n{number + 1}" for number in range(nodes)]
        self.pyxis_log = directory / "pyxis.log"  # one line for each container
        self.has_containers = False  # whether jobs can run in containers: see ``_make_pyxis``

    @classmethod
    @contextlib.contextmanager
    def running(cls) -> Iterator[Self]:
        """Starts a cluster, and stops it at the end."""
        cluster = cls(Path(tempfile.mkdtemp(prefix="slurm")))
        cluster.directory.chmod(0o755)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()

    def start(self) -> None:
        """Starts all daemons and waits until the nodes are idle."""
        (self.directory / "state").mkdir()
        for node in self._nodes:
            (self.directory / f"slurmd.{node}").mkdir()
        self.has_containers = self._make_pyxis()
        self._write_config()
        key = self.directory / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        munge_files = {
            "socket": "munge.sock",
            "key-file": "munge.key",
            "pid-file": "munged.pid",
            "seed-file": "munged.seed",
            "log-file": "munged.log",
        }
        options = (f"--{name}={self.directory / file}" for name, file in munge_files.items())
        run("munged", "--force", *options)
        os.environ["SLURM_CONF"] = str(self.directory / "slurm.conf")
        run("slurmctld")
        for node in self._nodes:
            run("slurmd", "-N", node)
        all_idle = ["idle"] * len(self._nodes)
        wait_for(lambda: run("sinfo", "-hN", "-o", "%T").split() == all_idle, 300)

    def stop(self) -> None:
        """Stops the jobs and daemons of this cluster."""
        with contextlib.suppress(Exception):
            run("scancel", "--me")
            wait_for(lambda: not run("squeue", "-h"), 120)
        pid_files = [*self.directory.glob("slurmd.*.pid"), self.directory / "slurmctld.pid"]
        for file in [*pid_files, self.directory / "munged.pid"]:
            with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGTERM)
        time.sleep(0.5)
        shutil.rmtree(self.directory, ignore_errors=True)
        os.environ.pop("SLURM_CONF", None)

    def _write_config(self) -> None:
        """Writes Slurm's configuration files, and the device files of the simulated GPUs."""
        directory, nodes = self.directory, len(self._nodes)
        # In the block of 500 ports, the first port is the controller's, the next ones are the
        # nodes'. srun uses those from 100 to 400.
        port = first_port_of_block(nodes + 1)
        values = {"nodes": nodes, "node_first": port + 1, "node_last": port + nodes}
        values |= {"srun_first": port + 100, "srun_last": port + 400}
        host = socket.gethostname().split(".")[0]
        text = CONF.format(dir=directory, host=host, port=port, **values)
        (directory / "slurm.conf").write_text(text)
        (directory / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        devices = [directory / f"gpu{number}" for number in range(8)]
        for device in devices:
            # A character device, like a real GPU. 1 and 3 are the device numbers of /dev/null.
            os.mknod(device, 0o20666, os.makedev(1, 3))
        gpus = f"NodeName=n[1-{nodes}] Name=gpu File={directory}/gpu[0-7]\n"
        (directory / "gres.conf").write_text(gpus)

    def _make_pyxis(self) -> bool:
        """Builds ``fakepyxis.c``, which replaces Pyxis, Slurm's container plugin.

        Returns:
            Whether the replacement can run here. It needs a compiler and the right to mount.
        """
        source, plugin = Path(__file__).with_name("fakepyxis.c"), self.directory / "fakepyxis.so"
        build = ["gcc", "-Wall", "-shared", "-fPIC", "-o", str(plugin), str(source)]
        (self.directory / "plugstack.conf").touch()
        try:
            subprocess.run(build, check=True, capture_output=True)
            subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return False
        root = self.directory / "container"
        # Containers mount these folders, to have this Python. They have /usr anyway.
        python_folders = {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
        expose = ",".join(map(str, sorted(python_folders - {Path("/usr")})))
        (self.directory / "plugstack.conf").write_text(
            f"required {plugin} root={root} log={self.pyxis_log} expose={expose}\n"
        )
        return True


def first_port_of_block(count: int) -> int:
    """Returns the first port of a block whose first ``count`` ports are free.

    Other processes may search at the same time. So the block that is tried first depends on the
    process id. The port also serves as the first job id. The launcher derives the rendezvous port
    of ranks from the job id, so the ranks of simultaneous clusters use different ports.
    """
    for number in range(BLOCKS):
        port = FIRST_PORT + (os.getpid() + number) % BLOCKS * BLOCK_PORTS
        # Creating a server fails if its port is used. Then the next block is tried.
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for offset in range(count):
                stack.enter_context(socket.create_server(("127.0.0.1", port + offset)))
            return port
    last_port = FIRST_PORT + BLOCKS * BLOCK_PORTS - 1
    raise AssertionError(
        f"no block of ports from {FIRST_PORT} to {last_port} starts with {count} free ports: "
        "stop other test clusters"
    )


def run(*command: str) -> str:
    """Returns the output of a command, which must succeed."""
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, f"{command}: {process.stderr}"
    return process.stdout


def wait_for(condition: Callable[[], object], seconds: float, pause: float = 0.1) -> None:
    """Waits until a condition is true; fails after ``seconds``. ``pause`` is also in seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition was still false after {seconds} s"
        time.sleep(pause)
