#!/usr/bin/env bash
# Installs Chromium, in which tests open the report, if it is missing and we are root on a system with
# apt-get. Without Chromium these tests are skipped with a reason.
set -uo pipefail
if command -v chromium >/dev/null || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  exit 0
fi
echo "installing Chromium for the report's tests"
{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } >/dev/null 2>&1 ||
  echo "Chromium could not be installed; its tests will be skipped"
