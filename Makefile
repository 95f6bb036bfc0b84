# Everything runs in .venv, which is made on first use. PYTHON: the interpreter to make it with.
PYTHON ?= python3
VENV := .venv
SERVERS := rabbitmq redis nats postgresql
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help check test bench demo format clean

help:  ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(READY): pyproject.toml scripts/environment
	scripts/environment "$(PYTHON)" $(VENV)
	@touch $@

check: $(READY)  ## style, types and the walls of the house
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(READY)  ## every test
	scripts/servers $(SERVERS)
	scripts/test $(BIN)/python

bench: $(READY)  ## ratios against the raw client, in this very run
	$(BIN)/python -m bench

demo: $(READY)  ## this machine's readings through a pipeline that is killed twice
	$(BIN)/python -m demo

format: $(READY)  ## put the source in order
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean:  ## remove what was made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache demo-run
