# `make help` lists what there is.
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
# Threads that wait soon sleep: libgomp lets them spin, which is 20 times slower where another job has one of the cores.
export GOMP_SPINCOUNT ?= 10000
PYTEST := $(PY) -m pytest -q -n logical --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

.PHONY: help setup demo test test-all test-faults test-mutants test-learning test-peers bench check
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | awk -F ':.*## ' '{printf "make %-13s %s\n", $$1, $$2}'

setup: $(VENV)/.installed  ## make .venv and install everything into it, test tools included

$(VENV)/.installed: setup.py
	@echo "installing gcssl and its dependencies into $(VENV) (about 2 minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "gcssl needs Python >= 3.11; give one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -qq --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: setup  ## pretrain, evaluate and export a small GC ViT on generated images, in a few minutes
	@$(PY) -m scripts.demo $(DEMO_ARGS)

test: setup  ## the test suite without what takes long
	@$(PYTEST) -m "not slow and not learning"

test-all: setup  ## the whole test suite
	@$(PYTEST) -m "not learning"

test-faults: setup  ## what a run must survive, broken on purpose: one row a fault; a quarter of an hour
	@$(PYTEST) -m fault

test-mutants: setup  ## break each guard on purpose and see its test fail; about half an hour
	@$(PY) -m scripts.mutants

test-learning: setup  ## does every objective learn; about an hour and a half, for the night
	@$(PY) -m pytest -q -m learning $(PYTEST_ARGS)

test-peers: setup  ## our losses beside lightly's, which it installs without its dependencies
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps 'lightly>=1.6,<2'
	@$(PYTEST) tests/ssl/test_peers.py

bench: setup  ## every benchmark on this machine, into docs/results; about twenty minutes
	@$(PY) -m scripts.bench $(BENCH_ARGS)

check: setup  ## linter, formatter and type checker
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --check --quiet . || { echo "not formatted; run: $(VENV)/bin/ruff format ." >&2; exit 1; }
	@$(VENV)/bin/mypy
