# make train ARGS="--epochs 1": set up .venv and train.    make test: set up and run the tests (three minutes).
# make test-all: the slow proofs too, and the tests of what needs further packages.
# make lint: format and style.    make clean: remove .venv.
# PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-all lint clean
train: .venv/installed
	$(BIN)/python train.py $(ARGS)

test: .venv/installed-dev
	$(BIN)/python -m pytest $(ARGS)

test-all: .venv/installed-all
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:
	rm -rf .venv

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@

.venv/installed-all: .venv/installed-dev requirements-bench.txt requirements-demo.txt
	$(BIN)/python -m pip install -r requirements-bench.txt -r requirements-demo.txt
	touch $@
