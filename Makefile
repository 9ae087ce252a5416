# Every target makes the environment it needs first; nothing has to be exported or activated.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.graft-installed
LM_EVAL := $(VENV)/lm-eval
PIP    := $(BIN)/python -m pip --disable-pip-version-check
SHOWN  := sed -unE 's/^Collecting ([^ ]+).*/  \1/p; s/^Installing .*/  unpacking all of them .../p'
SHELL  := /bin/bash -o pipefail

export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo deployment-demo test test-all test-trackers test-eval check lint bench parity proto clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) \
	  | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make the environment in .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Graft needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing Graft into $(VENV): the $$(grep -c == constraints.txt) packages it was tested with"
	@{ $(PIP) install --no-deps --no-compile -r constraints.txt | $(SHOWN) && echo "  graft" \
	  && $(PIP) install --quiet --no-deps --no-build-isolation -e . && $(PIP) check; } || { \
	  echo "that set is not whole on this machine (another Python, platform or torch);" \
	    "now pip chooses, as near to it as it can: this takes minutes"; \
	  $(PIP) install -c constraints.txt -e '.[dev,gguf]' | $(SHOWN); }
	@echo "  compiling, all cores at once"
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # some packages ship templates
	@touch $@
	@echo "done. Activate it with: source $(VENV)/bin/activate"

demo: $(STAMP)  ## train the demo: a split transformer across simulated clients
	@$(BIN)/graft demo

deployment-demo: $(STAMP)  ## the same app under a SuperLink and two SuperNodes, TLS and node keys
	@$(BIN)/graft deployment-demo

test: $(STAMP)  ## the fast tests, two at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: $(STAMP)  ## every test, the slow ones too
	$(BIN)/python -m pytest -m ''

test-trackers: $(STAMP)  ## install Trackio, W&B and MLflow, and test their sinks with them
	$(PIP) install --quiet -c constraints.txt -c constraints-trackers.txt -e '.[trackio,wandb,mlflow]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/flower_app/runs/sinks/test_trackers.py

test-eval: $(LM_EVAL)/bin/lm_eval  ## lm-evaluation-harness, in an environment of its own, measures through graft api
	$(BIN)/python -m pytest -m slow tests/simulations/api/test_lm_eval.py

$(LM_EVAL)/bin/lm_eval: $(STAMP) constraints-eval.txt
	$(PYTHON) -m venv $(LM_EVAL)
	$(LM_EVAL)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-eval.txt 'lm-eval[api]'
	@touch $@

check: $(STAMP)  ## format, lint and type-check (changes files)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy

lint: $(STAMP)  ## the same without changing a file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## split step against unsplit step, and memory by role
	$(BIN)/graft bench step
	$(BIN)/graft bench memory

parity: $(STAMP)  ## split = unsplit on every family in the tested table
	$(BIN)/graft parity --families

proto: $(STAMP)  ## generate the protobuf code again after a change of trunk.proto
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. \
	  strategies/transport/trunk.proto

clean:  ## remove caches and builds; the environment and the runs stay
	rm -rf build dist *.egg-info *.fab .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
