# dualsweep: the two commands are `make sweep` and `make test`; each sets up .venv first and skips that when it is done.
#
# Variables: PYTHON=python3.12          which interpreter makes .venv
#            TORCH="torch==2.12.0"      what to hand to `pip install` for torch, options included; replaces the choice below
#            SWEEP=path/to/sweep.yaml   which sweep `make sweep` runs
#            SWEEP_ARGS="primal.steps=200"            more arguments for `dualsweep sweep`
#            PYTEST_ARGS="-m 'not slow and not heavy'"   more arguments for pytest

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
SWEEP ?= examples/digits_fairness.yaml
SWEEP_ARGS ?=
PYTEST_ARGS ?=
TORCH ?=

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# What a machine without an NVIDIA GPU gets. PyPI's own Linux wheels carry gigabytes of CUDA; PyTorch's CPU index does not.
CPU_TORCH := torch==2.13.0+cpu
CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help venv sweep test test-faults lint clean
.DELETE_ON_ERROR:

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 16

sweep: $(VENV)/.installed ## set up, then run the bundled sweep (6 minutes on 2 cores); its report is named at the end
	$(VENV)/bin/dualsweep sweep $(SWEEP) --fresh-name $(SWEEP_ARGS)

# pytest's own script, not `python -m pytest`: the latter puts this folder first on sys.path, and with it our `datasets`.
# Two processes of one thread each: files side by side, all that starts Ray in one of them (tests/conftest.py).
test: $(VENV)/.installed-test ## set up, then run the whole test suite
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest --numprocesses 2 --dist loadgroup $(PYTEST_ARGS)

test-faults: $(VENV)/.installed-test ## set up, then every test of faults, those too long for `make test` too
	$(VENV)/bin/pytest tests/faults -m "heavy or not heavy" $(PYTEST_ARGS)

lint: $(VENV)/.installed-lint ## ruff, as configured in pyproject.toml
	$(VENV)/bin/ruff check .

venv: $(VENV)/.installed ## set up only

clean: ## remove what set-up, builds and tests left; results in runs/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A half-made environment is removed, so that the next `make` starts over instead of tripping on it.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "dualsweep needs Python 3.11 or newer and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	# The pip of an older Python may search minutes for versions that fit together; without a newer one, it has to do.
	-$(PIP) install --quiet --upgrade pip

# torch comes first, by itself, because pip cannot be told "the CPU build if there is one" in pyproject.toml.
# Without a GPU: a wheel that lies in a configured find-links folder, else PyTorch's CPU index (one short try: it may be
# out of reach), else whatever the index has. With a GPU, or on macOS, whose plain wheels are small: plain torch.
$(VENV)/.torch: | $(VENV)/bin/python
	@if [ -n '$(strip $(TORCH))' ]; then set -x; $(PIP) install $(foreach word,$(TORCH),'$(word)'); \
	elif [ "$$(uname -s)" != Linux ] || timeout 20 nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then \
	    set -x; $(PIP) install 'torch>=2.6'; \
	else \
	    set -x; \
	    $(PIP) install --no-index --no-deps 'torch>=2.6' 2>/dev/null || \
	    $(PIP) install --no-deps --timeout 10 --retries 0 --index-url $(CPU_INDEX) '$(CPU_TORCH)' || \
	    $(PIP) install 'torch>=2.6'; \
	fi
	@touch $@

# Editable, so that an edit counts at once; a changed pyproject.toml installs again.
$(VENV)/.installed: pyproject.toml | $(VENV)/.torch
	$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/.torch
	$(PIP) install --editable '.[test]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-lint: pyproject.toml | $(VENV)/bin/python
	$(PIP) install 'ruff>=0.12'
	@touch $@
