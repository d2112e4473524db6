#!/usr/bin/env bash
#   ./install.sh            installs everything: for stages, tests and development
#   ./install.sh launcher   installs only the launcher, for a login node
# Creates a virtual environment and installs the pinned packages. A stamp file holds the hashes of the
# files that decide what is installed; if they are unchanged, a second call does nothing. Every package
# must have a hash that is in requirements/, except torch: if the machine has a CUDA build of torch (in
# an NGC container), or pip's index provides a build with a local version (2.13.0+cpu), this build is
# used without a hash. In an NGC container, other packages of the image stay, too, if they fit.
set -euo pipefail
unset PIP_CONSTRAINT # NGC containers set it to the versions of the image
cd "$(dirname "$0")"
lock=requirements/${1:-dev}.txt
if [ ! -f "$lock" ]; then
  echo "error: there is nothing to install as '$1'." >&2
  echo "  fix: ./install.sh or ./install.sh launcher" >&2
  exit 1
fi
venv=${VENV:-.venv}
stamp=$venv/.installed
wanted=$lock$'\n'$(sha256sum pyproject.toml install.sh requirements/*)
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
needs_torch=$([ "$lock" = requirements/launcher.txt ] || echo yes)
options=()
if [ -n "$needs_torch" ] && "$python" -c 'import torch, sys; sys.exit(torch.version.cuda is None)' 2>/dev/null; then
  options=(--system-site-packages)
fi
if [ ! -x "$venv/bin/python" ] && ! "$python" -m venv "${options[@]}" "$venv"; then
  echo "error: no virtual environment could be made." >&2
  echo "  fix: on Debian or Ubuntu, apt-get install python3-venv" >&2
  exit 1
fi
if [ ${#options[@]} -gt 0 ]; then
  # The option gives access to the base interpreter's packages. An image may have more in a virtual environment.
  packages='import sys, sysconfig; sys.prefix == sys.base_prefix or print(sysconfig.get_path("purelib"))'
  "$python" -c "$packages" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/image.pth"
fi
echo "installing $lock into $venv (once, a few minutes)"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps)
install_missing() { "$venv/bin/python" requirements/install_missing.py "$@" "${pip[@]}" --require-hashes -r; }
if [ ${#options[@]} -gt 0 ]; then
  install_missing "$lock"
else
  install_missing --exact "$lock"
fi
if [ -n "$needs_torch" ] && [ ${#options[@]} -eq 0 ]; then
  mapfile -t torch < <(grep -oE '^torch(vision)?==[0-9.]+' requirements/torch.txt)
  if "${pip[@]}" --dry-run --ignore-installed --report - "${torch[@]}" | grep -qE '"version": "[^"]*\+'; then
    "${pip[@]}" "${torch[@]}"
  else
    "${pip[@]}" --require-hashes -r requirements/torch.txt
  fi
fi
if [ -n "$needs_torch" ]; then "${pip[@]}" --no-build-isolation -e .; fi
if [ ${#options[@]} -gt 0 ]; then
  "$venv/bin/python" -c 'import megatron.core, modelopt.torch, nemo.collections.llm, transformer_engine.pytorch'
fi
echo "$wanted" >"$stamp"
