# Two commands do everything from a fresh clone:
#   make train   sets up the environment and runs the main job
#   make test    sets up the environment and runs linter, type checker and tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test

train: $(VENV)/installed
	$(BIN)/python -m monai.bundle run training --config_file configs/train.json

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e ".[test]"
	touch $@
