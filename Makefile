# Two commands set up a fresh machine: `make quickstart` and `make test`. Set PYTHON to choose another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
FOLDERS = framework models gin tasks launch

.PHONY: quickstart test slow proofs accelerator lint types view

$(BIN)/meshway: setup.py
	@echo "installing meshway and what it needs into $(VENV), once: some minutes, by the network"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install -e ".[test]"
	touch $@

# QUICKSTART_FLAGS are more words for the training, as --gin.TRAIN_STEPS=100.
quickstart: $(BIN)/meshway
	@echo "1 of 3: training a small T5 to read dates and to fill in text, about two minutes on two cores"
	$(BIN)/meshway train --gin_file=quickstart --gin.MODEL_DIR=runs/quickstart $(QUICKSTART_FLAGS)
	@echo "2 of 3: evaluating the last checkpoint on dates and text that it never saw"
	$(BIN)/meshway eval --model_dir=runs/quickstart
	@echo "3 of 3: reading all the dates of the validation split"
	$(BIN)/meshway infer --model_dir=runs/quickstart --split=validation --output=runs/quickstart/predictions.jsonl
	@echo "the first of runs/quickstart/predictions.jsonl:"
	@sed -n '1,5s/.*\("inputs":.*\),"tokens".*/  \1/p' runs/quickstart/predictions.jsonl
	@echo "curves, metrics and more predictions: runs/quickstart/report.html"

# Which tests: quick ones, unless told otherwise. `.ci/run` takes quick and slow ones in one run.
TIER ?= not slow and not proofs
PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal -q

test: $(BIN)/meshway
	$(PYTEST) -m "$(TIER)"

slow: $(BIN)/meshway
	$(PYTEST) -m slow

proofs: $(BIN)/meshway
	$(PYTEST) -m proofs

# Checks and figures of a machine with a GPU or TPU, in about ten minutes; ACCELERATOR_FLAGS=--small tries it anywhere.
accelerator: $(BIN)/meshway
	$(BIN)/meshway bench accelerator --gin_file=bench_accelerator $(ACCELERATOR_FLAGS)

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
