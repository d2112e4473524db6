#!/usr/bin/env bash
# The tests in tests/slurm start a Slurm of their own. Where it is missing and may be installed, it
# is; elsewhere those tests are skipped with a reason.
set -uo pipefail
if { command -v slurmctld && command -v munged; } >/dev/null || [ "$(id -u)" != 0 ] ||
  ! command -v apt-get >/dev/null; then
  exit 0
fi
echo "installing Slurm for its tests"
packages=(slurmctld slurmd slurm-client munge libslurm-dev gcc libc6-dev)
{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
  "${packages[@]}"; } >/dev/null 2>&1 || echo "Slurm could not be installed; its tests will be skipped"
