# make demo   installs what is missing, then runs a recipe on the embedded model
# make test   installs what is missing, then runs every test
# make test-gpu   half an hour on one GPU, step by step (tests/gpu/plan.py); installs nothing
# make lint   ruff, mypy and the quick tests, as pre-commit runs them
# make docs   the documents as a site in docs/_site; a warning fails
# make sbom   what is installed, with licences: sbom.json, in CycloneDX's form
# make lock   what is installed, in requirements; ARGS="PACKAGE ..." become the newest that fit
#
# Variables: RECIPE, ARGS (overrides for demo, options for test), WORKERS (of the tests), PYTHON (3.11
# or 3.12), VENV.

RECIPE ?= llama_depth_prune
VENV ?= .venv
# One more than the cores, since tests also wait: for Slurm, for ranks, for what they kill.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n + 1 : 4)))
export VENV PYTHON

.PHONY: demo test test-gpu lint docs sbom lock install
demo: install
	$(VENV)/bin/python launch/run.py recipe=$(RECIPE) $(ARGS)

test: install
	@tests/install_browser.sh
	@tests/install_slurm.sh
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest \
	  -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu:
	$(VENV)/bin/python -m tests.gpu.plan $(ARGS)

lint: install
	PATH="$(abspath $(VENV))/bin:$$PATH" pre-commit run --all-files

docs: install
	$(VENV)/bin/python -m sphinx -q -W --keep-going -c docs . docs/_site
	@echo "open docs/_site/docs/index.html"

sbom: install
	$(VENV)/bin/python -m launch.reference.dependencies >sbom.json

lock: install
	$(VENV)/bin/python -m launch.reference.lock $(ARGS)

install:
	@./install.sh
