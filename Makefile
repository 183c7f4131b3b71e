# Every target sets up what it needs; nothing has to be done before. `make` alone lists the targets.
# Variables: PYTHON (3.11 or newer), VENV (where the environment lies), EXTRA (which Mooncake build: cpu, cuda12, cuda13;
# the one that the environment has, or cpu for a new one),
# MODEL (make run: folder or Hugging Face hub id), TESTS (make test: what to run),
# JOBS (make test: in how many processes; 0 is pytest's own, where -s and --pdb work),
# MARKS (make test: pytest's -m; empty runs the slow tests too), CLIENTS (make test-clients: what to run), ARGS (more flags for run and bench).
PYTHON ?= python3
VENV ?= .venv
EXTRA ?= $(or $(patsubst $(VENV)/.ramet-%,%,$(firstword $(shell ls -t $(VENV)/.ramet-* 2>/dev/null))),cpu)
MODEL ?=
TESTS ?= test/integration test/unit
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
MARKS ?= not slow
CLIENTS ?= test/clients
ARGS ?=

STAMP := $(VENV)/.ramet-$(EXTRA)
LOWEST := $(VENV)-lowest/.made
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup setup-lowest run test test-lowest test-clients lint format docs proto bench demo-model clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## make the virtual environment and install everything
$(STAMP): setup.py constraints.txt scripts/setup_env.sh
	@bash scripts/setup_env.sh $(VENV) $(PYTHON) $(EXTRA)
	@rm -f $(VENV)/.ramet-*
	@touch $@

setup-lowest: $(LOWEST) ## make the environment of test-lowest
$(LOWEST): $(STAMP) scripts/lowest_env.sh scripts/lowest_versions.py
	@bash scripts/lowest_env.sh $(VENV)
	@touch $@

run: $(STAMP) ## start a seed, clone it, ask both the same question; MODEL=... takes a real model
	@$(BIN)/python examples/clone_demo.py $(if $(MODEL),--model-path $(MODEL)) $(ARGS)

# A file's tests stay together, in their order: many share a server. Long ones come first, so that all end together.
SIDE_BY_SIDE := -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: $(STAMP) ## run the integration and the unit tests, side by side; TESTS=... picks
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "$(MARKS)" $(TESTS)

test-lowest: $(LOWEST) ## run a part of the tests with the lowest versions that setup.py allows
	@bash scripts/test_lowest_versions.sh $(VENV) $(SIDE_BY_SIDE)

test-clients: $(STAMP) ## run published clients against a server; CLIENTS=... picks; the first time fetches several GB
	PYTHONPATH=test $(BIN)/python -m clients.environments
	$(BIN)/python -m pytest $(CLIENTS)

lint: $(STAMP) ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## bring the code into the form that lint checks
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP) ## write docs/flags.md, the tables in docs/http.md and Grafana's dashboard anew from the code
	$(BIN)/python scripts/make_flags_doc.py
	$(BIN)/python scripts/make_http_doc.py
	$(BIN)/python scripts/make_dashboard.py

proto: $(STAMP) ## write the stubs of ModelExpress anew from its proto files
	$(BIN)/python scripts/make_proto.py

bench: $(STAMP) ## run all benchmarks; results go to .run/bench
	$(BIN)/python benchmark/run_all.py $(ARGS)

demo-model: $(STAMP) ## train examples/demo_model anew (some minutes)
	$(BIN)/python examples/make_demo_model.py

clean: ## remove the environment, caches and results
	rm -rf $(VENV) $(VENV)-lowest .run build dist wheels .pytest_cache .ruff_cache .mypy_cache .hypothesis python/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
