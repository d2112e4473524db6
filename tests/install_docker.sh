#!/usr/bin/env bash
# Installs Docker, which the tests in tests/docker start, if it is missing and we are root on a system
# with apt-get. Without it these tests are skipped with a reason.
set -uo pipefail
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0

install() { DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1"; }
{ command -v dockerd && command -v docker; } >/dev/null && exit 0
echo "installing Docker for its tests"
# In Debian 13 the client is a package of its own.
{ apt-get update -qq && install docker.io && { command -v docker || install docker-cli; }; } >/dev/null 2>&1 ||
  echo "Docker could not be installed; its tests will be skipped"
