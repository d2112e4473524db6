#!/usr/bin/env bash
# The report's tests open it in Chromium. Where it is missing and may be installed, it is; elsewhere
# those tests are skipped with a reason.
set -uo pipefail
if command -v chromium >/dev/null || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  exit 0
fi
echo "installing Chromium for the report's tests"
{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } >/dev/null 2>&1 ||
  echo "Chromium could not be installed; its tests will be skipped"
