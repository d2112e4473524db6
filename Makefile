# make demo       installs missing packages, then runs a recipe on the included model
# make test       installs missing packages, then runs every test
# make test-gpu   tests one GPU, in half an hour (tests/gpu/plan.py); installs nothing
# make lint       runs pre-commit: ruff, mypy and the quick tests
# make docs       builds a website of the documents in docs/_site; a warning is an error
# make lock       pins dependencies with hashes in requirements; ARGS="--upgrade-package PACKAGE" updates one
# make sbom       writes sbom.json, a CycloneDX bill of materials of the virtual environment
#
# Variables: RECIPE, ARGS (overrides for demo, options for test), WORKERS (number of test processes),
# PYTHON (an interpreter of version 3.11 or 3.12), VENV (folder of the virtual environment).

RECIPE ?= llama_depth_prune
VENV ?= .venv
# One more process than cores (at most 4), because tests also wait: for Slurm, for ranks, and for processes to end.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n + 1 : 4)))
export VENV PYTHON

.PHONY: demo test test-gpu lint docs sbom lock install
demo: install
	$(VENV)/bin/python launch/run.py recipe=$(RECIPE) $(ARGS)

test: install
	@tests/install_browser.sh
	@tests/install_slurm.sh
	@tests/install_docker.sh
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest \
	  -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu:
	$(VENV)/bin/python -m tests.gpu.plan $(ARGS)

lint: install
	PATH="$(abspath $(VENV))/bin:$$PATH" pre-commit run --all-files

docs: install
	$(VENV)/bin/python -m sphinx -q -W --keep-going -c docs . docs/_site
	@echo "open docs/_site/docs/index.html"

# Existing pins stay unless ARGS upgrades them.
COMPILE = $(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --no-annotate --custom-compile-command 'make lock' $(ARGS)
lock: install
	$(COMPILE) pyproject.toml --extra train --extra cpu --extra tasks --extra mlflow --excludes requirements/excludes.txt -o requirements/stack.txt \
	  --no-emit-package cuda-bindings --no-emit-package cuda-pathfinder  # the image has its own
	$(COMPILE) pyproject.toml --extra dev --excludes requirements/excludes.txt -o requirements/dev.txt
	$(COMPILE) pyproject.toml --extra launcher --constraints requirements/stack.txt -o requirements/launcher.txt
	$(COMPILE) pyproject.toml --extra launcher --extra tasks --constraints requirements/stack.txt --excludes requirements/excludes.txt \
	  -o requirements/engine.txt --no-emit-package setuptools --no-emit-package transformers --no-emit-package xllamacpp
	(grep -o 'torch>=[^"]*' pyproject.toml; echo torchvision) \
	  | $(COMPILE) - --constraints requirements/dev.txt -o requirements/torch.txt

# The tool runs in an environment of its own, because it needs another version of chardet than our packages.
sbom: install
	$(VENV)/bin/uv tool run --from cyclonedx-bom==7.5.0 \
	  cyclonedx-py environment --output-file sbom.json $(VENV)/bin/python

install:
	@./install.sh
