# SPDX-License-Identifier: Apache-2.0
SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
# More arguments for pytest or the benchmarks: make test ARGS='-k header'
ARGS ?=
# Processes that run the tests side by side, a file at a time; 0: none beside pytest itself.
# Much of their time is waiting: four keep two cores busy. In the order of their names: the folders with
# the longest tests come first, and pure ones (vma/) last, so that none works alone at the end.
WORKERS ?= 4
# Tests start thousands of processes. Where this is set, each would compile all modules anew: a third
# of the CPU time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test lint format man bench soak clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup:  ## Make .venv, and as root on Debian install missing packages
	@scripts/setup

demo: setup  ## A backup and a restore, to look at
	$(BIN)/python scripts/demo

test: lint  ## All that must pass: lint, then the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(ARGS)

lint: setup  ## Style, types, and which room imports which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup  ## Let ruff format the code and mend what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

man: setup  ## Manual pages and shell completions, into build/
	$(BIN)/python scripts/manual build

bench: setup  ## Compare our speed with other tools; writes docs/benchmarking.md
	$(BIN)/python -m benchmarks $(or $(ARGS),--write)

soak: setup  ## The tests that take minutes (markers slow and soak)
	VMAPIPE_TESTS_EXEC=1 $(BIN)/python -m pytest -m 'slow or soak' --timeout 3600 $(ARGS)

clean:  ## Remove .venv and everything else that setup, builds and tests made
	rm -rf .venv build dist ./*.egg-info .mypy_cache .ruff_cache .import_linter_cache
	rm -rf .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
