# `make` alone lists the targets. Each target does all the set-up that it needs.
.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
PROTO_FILES := $(wildcard protos/grafos_proto/v1/*.proto)
# What `make test` leaves out: marked tests that have a target of their own.
DESELECTED := not slow and not bench and not chaos
# Tests side by side: most wait for deadlines and for processes, so three keep two cores busy.
JOBS ?= 3
# Passed on to pytest: make test ARGS="-k lessor -x"
ARGS ?=
N ?= 200

export PYTHON

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: venv
venv:
	@tools/setup.sh python

.PHONY: setup
setup: ## virtual environment, locked dependencies, Debian packages for the tests
	@tools/setup.sh

.PHONY: demo
demo: venv ## a local cluster with real data and real failures, explained as it goes
	@$(VENV)/bin/grafos demo

.PHONY: test
test: setup ## the whole default suite
	@$(PY) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "$(DESELECTED)" $(ARGS)

.PHONY: lint
lint: venv ## style, types, import contracts
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@PYTHONPATH=.:core:protos:sdk $(VENV)/bin/lint-imports --no-logo
	@$(VENV)/bin/mypy

.PHONY: fmt
fmt: venv ## format and sort imports
	@$(VENV)/bin/ruff check --fix --quiet .
	@$(VENV)/bin/ruff format .

.PHONY: gen
gen: venv ## regenerate the code made from protos/
	@$(PY) tools/gen_protos.py

.PHONY: gen-check
gen-check: venv ## fail where generated code is not what the protos give
	@$(PY) tools/gen_protos.py --check

.PHONY: check
check: lint gen-check ## the quick gate: lint, generated code, fast tests
	@$(PY) -m pytest -q -x -m "$(DESELECTED)" tests/core tests/sdk tests/services tests/test_tidy.py

.PHONY: bench
bench: setup ## measurements beside etcd and Redis; the JSON file's path is printed last
	@$(PY) -m tests.bench

.PHONY: sim
sim: venv ## replay one simulated history: make sim SEED=n
	@$(PY) -m tests.sim $(if $(SEED),--seed $(SEED))

.PHONY: chaos
chaos: setup ## kill processes over and over: make chaos N=200, SEED=n for one again, HARM=any for bad disks
	@$(PY) -m tests.chaos $(if $(SEED),--seed $(SEED) -n 1,-n $(N)) $(if $(HARM),--harm $(HARM))

.PHONY: power-cuts
power-cuts: setup ## every disk that a power cut can leave, for every store: SEED=n for the same subsets
	@$(PY) -m tests.disk $(if $(SEED),--seed $(SEED))

.PHONY: up
up: venv ## start a local cluster
	@$(VENV)/bin/grafos up

.PHONY: down
down: venv ## stop the local cluster
	@$(VENV)/bin/grafos down
