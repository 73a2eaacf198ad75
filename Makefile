# Every target works in .venv of this checkout and sets up what it needs. PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
# Each of several hundred processes would compile everything anew.
unexport PYTHONDONTWRITEBYTECODE
# Tests of one file run in one process, so that what a file prepares is prepared once.
PARALLEL := --numprocesses 3 --dist loadfile --no-loadscope-reorder

.PHONY: help install demo check test coverage lint types docs faults bench-check studies-small clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 14

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu]'
	touch $@

.venv/dev: .venv/core
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# Weights and a photograph for tests; what these packages require is not needed, or contradicts our requirements.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps facenet-pytorch scikit-image
	touch $@

install: .venv/dev  ## make .venv with everything that development needs

demo: .venv/core  ## train on procedural faces and see how good the model is (minutes on 2 cores)
	$(BIN)/partialfc demo --out runs/demo

check: lint types  ## lint, types, import contract and the quick tests (under 3 minutes on 2 cores)
	$(BIN)/python -m pytest -q -m "not slow" $(PARALLEL) $(ARGS)

test: .venv/dev  ## run all tests (about 20 minutes on 2 cores)
	$(BIN)/python -m pytest -q $(PARALLEL) $(ARGS)

coverage: .venv/dev  ## run all tests and print the branches that none reaches; takes half as long again
	$(BIN)/python -m pytest -q --cov --cov-report=term $(PARALLEL) $(ARGS)

lint: .venv/dev  ## ruff and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/dev  ## mypy
	$(BIN)/mypy

faults: .venv/core  ## inject every fault into real training processes; writes the table of docs/reliability.md
	$(BIN)/python benchmarks/faults.py --out runs/faults

bench-check: .venv/core  ## compare the speed of head, sampler and loader with BASE (the parent commit); fails at +10 %
	$(BIN)/python benchmarks/check.py $(if $(BASE),--base $(BASE)) $(ARGS)

.venv/docs: .venv/core
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: .venv/docs  ## build the site of the documentation in docs/_build/html
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html docs docs/_build/html

studies-small: .venv/dev  ## run every study at toy size (6 minutes on 2 cores; needs fonts, examples/characters)
	$(BIN)/python studies/all.py small --work runs/studies-small

clean:  ## remove the environment, the runs and the site
	rm -rf .venv runs docs/_build
