#!/usr/bin/env bash
# Installs Slurm and Open MPI, which the tests in tests/slurm start, if they are missing and we are root on
# a system with apt-get. Without them these tests are skipped with a reason.
set -uo pipefail
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0

install() { # PURPOSE PACKAGE...
  echo "installing $1 for its tests"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    "${@:2}"; } >/dev/null 2>&1 || echo "$1 could not be installed; its tests will be skipped"
}
{ command -v slurmctld && command -v munged; } >/dev/null ||
  install Slurm slurmctld slurmd slurm-client munge libslurm-dev gcc libc6-dev
command -v mpirun >/dev/null || install "Open MPI" openmpi-bin python3-mpi4py
