# Two commands set up a fresh machine: `make quickstart` and `make test`. Set PYTHON to choose another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
FOLDERS = framework models gin tasks launch

.PHONY: quickstart test slow proofs lint types view

$(BIN)/meshway: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

quickstart: $(BIN)/meshway
	$(BIN)/meshway train --gin_file=quickstart --gin.MODEL_DIR=runs/quickstart
	$(BIN)/meshway eval --model_dir=runs/quickstart
	$(BIN)/meshway infer --model_dir=runs/quickstart --split=validation --output=runs/quickstart/predictions.jsonl

# Which tests: quick ones, unless told otherwise. `.ci/run` takes quick and slow ones in one run.
TIER ?= not slow and not proofs
PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal -q

test: $(BIN)/meshway
	$(PYTEST) -m "$(TIER)"

slow: $(BIN)/meshway
	$(PYTEST) -m slow

proofs: $(BIN)/meshway
	$(PYTEST) -m proofs

$(BIN)/ruff: $(BIN)/meshway
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

lint: $(BIN)/ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/ruff view
	$(BIN)/mypy .view/meshway/framework .view/meshway/models .view/meshway/launch

# Links that show the five folders as the package they are installed as, for type checkers and editors.
view:
	mkdir -p .view/meshway
	for folder in $(FOLDERS); do ln -sfn ../../$$folder .view/meshway/$$folder; done
