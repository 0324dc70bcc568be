# These commands do everything from a fresh clone:
#   make train   sets up the environment and runs the main job
#   make test    sets up the environment and runs linters, type checker and tests
#   make check   the same with the fast tests alone, about a minute
#   make test-clinical   tests with real Orthanc, MONAI Label and MONAI Deploy; they need the Debian packages below
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test check lint test-clinical debian-packages

train: $(VENV)/installed
	$(BIN)/python -m monai.bundle run training --config_file configs/train.json

test: lint
	$(BIN)/python -m pytest

check: lint
	$(BIN)/python -m pytest -q -m "not slow and not clinical"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-clinical: $(VENV)/installed
	$(BIN)/python -m pytest tests/clinical

SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

debian-packages:
	$(SUDO) apt-get update -qq
	$(SUDO) apt-get install -y -qq --no-install-recommends orthanc orthanc-dicomweb dcmtk dicom3tools

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e ".[test]"
	touch $@
