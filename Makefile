# make train       train the default model on the bundled images (installs on first use; resumes)
# make test        lint, types and all tests (installs on first use)
# make quick       the tests that take a few seconds at most: for everyday work
# make bench       all CPU benchmarks, in less than ten minutes, and their tables in the docs
# make bench-gpu   those of one CUDA device; ARGS=--dry: the same code with tiny sizes on a CPU
# make setup       only install, into .venv

PYTHON ?= python3.11
# One rank per GPU; two on a machine without.
NPROC ?= $(or $(filter-out 0,$(shell nvidia-smi --list-gpus 2>/dev/null | wc -l)),2)
ARGS ?=
# Tests run in so many processes, some with up to four ranks of their own; 0: in this one, for --pdb.
TEST_PROCESSES ?= 2
# Seconds that a test's ranks have for their result: more for a slow or busy machine.
export MOEVIT_TEST_TIMEOUT_S ?= 180
PYTEST = $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

BIN := .venv/bin
# One thread per rank: ranks share the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: setup train test quick lint bench bench-gpu clean

setup: .venv/.train
train: .venv/.train
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) train.py $(ARGS)

test: lint
	$(PYTEST) $(ARGS)

quick: .venv/.test
	$(PYTEST) -m "not slow" $(ARGS)

lint: .venv/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/.train
	$(BIN)/python -m benchmarks.run cpu $(ARGS)

bench-gpu: .venv/.train
	$(BIN)/python -m benchmarks.run gpu $(ARGS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

# A stamp per requirements file: an edited file installs again, an unchanged one costs nothing.
.venv/.train: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.test: requirements-dev.txt .venv/.train
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
