#!/usr/bin/env bash
# Makes the virtual environment once. A stamp holds the hashes of its inputs, so that a second call
# does nothing. Every package must have a hash that is in requirements/, except torch: a build that
# the machine has (in an NGC container) or that pip's index or folder provides (2.13.0+cpu) is used
# as it is.
set -euo pipefail
unset PIP_CONSTRAINT # NGC containers set it to the versions of the image
cd "$(dirname "$0")"
venv=${VENV:-.venv}
stamp=$venv/.installed
wanted=$(sha256sum pyproject.toml install.sh requirements/*.txt)
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
echo "installing the locked stack into $venv (once, a few minutes)"
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"; }
install --require-hashes -r requirements/dev.txt
if [ ${#options[@]} -eq 0 ]; then
  mapfile -t torch < <(grep -oE '^torch(vision)?==[0-9.]+' requirements/torch.txt)
  if install --dry-run --ignore-installed --report - "${torch[@]}" | grep -qE '"version": "[^"]*\+'; then
    install "${torch[@]}"
  else
    install --require-hashes -r requirements/torch.txt
  fi
fi
install --no-build-isolation -e .
# Not `pip check`: in a container it would check every package of the image.
"$venv/bin/python" - requirements/dev.txt <<'CHECK'
import re
import sys
from importlib.metadata import version
from pathlib import Path

from packaging.markers import Marker

pins = re.findall(r"^([\w.-]+)==(\S+) ; (.+?) \\$", Path(sys.argv[1]).read_text(), re.M)
here = {name: pin for name, pin, marker in pins if Marker(marker).evaluate()}
wrong = [f"{name} {version(name)} instead of {pin}" for name, pin in here.items() if version(name) != pin]
if not here or wrong:
    sys.exit(f"error: installed are {', '.join(wrong) or 'no pins'}\n  fix: remove the environment and make install")
CHECK
echo "$wanted" >"$stamp"
