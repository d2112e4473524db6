#!/usr/bin/env bash
# Makes the virtual environment, once: a stamp of pyproject.toml says whether there is work to do.
# A CUDA build of torch that is already there, as in an NGC container, is used and not replaced.
set -euo pipefail
cd "$(dirname "$0")"
venv=${VENV:-.venv}
stamp=$venv/.installed
wanted=$(sha256sum pyproject.toml install.sh)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }
for python in ${PYTHON:-python3 python3.12 python3.11} ""; do
  if [ -n "$python" ] && fits "$python"; then break; fi
done
if [ -z "$python" ]; then
  echo "error: Python 3.11 or 3.12 is needed; not found as: ${PYTHON:-python3 python3.12 python3.11}" >&2
  echo "  fix: install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
  exit 1
fi
options=()
if "$python" -c 'import torch, sys; sys.exit(torch.version.cuda is None)' 2>/dev/null; then
  options=(--system-site-packages)
fi
if [ ! -x "$venv/bin/python" ] && ! "$python" -m venv "${options[@]}" "$venv"; then
  echo "error: no virtual environment could be made." >&2
  echo "  fix: on Debian or Ubuntu, apt-get install python3-venv" >&2
  exit 1
fi
echo "installing the pinned stack into $venv (once, a few minutes)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[dev]"
"$venv/bin/python" -m pip check
echo "$wanted" >"$stamp"
