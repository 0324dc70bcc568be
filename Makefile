# These commands do everything from a fresh clone:
#   make train   sets up the environment and runs the main job
#   make test    sets up the environment and runs linters, type checker and tests
#   make check   the same with the fast tests alone, two minutes
#   make docs    makes the documentation site in output/site, and fails at a warning
#   make links   asks whether the links to other sites lead somewhere; needs the internet
#   make audit   fails if a dependency has a known hole; says so where that cannot be known
#   make sbom    writes a bill of materials of the environment (CycloneDX) to output/sbom.json
#   make charts  builds the charts of reports anew from npm, and fails if they are not those that are here
#   make bundle  makes dist/*.zip for MONAI's model zoo and checks it; MODEL=output/model.pt puts a trained model in
#   make test-clinical   tests with real Orthanc, MONAI Label and MONAI Deploy; they need the Debian packages below
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := .venv-tools

.PHONY: train test check lint docs links audit sbom bundle charts test-clinical debian-packages

train: $(VENV)/installed
	PYTHONWARNINGS="ignore:parsing config_file" $(BIN)/python -m monai.bundle run training --config_file configs/train.json

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 25

check: lint
	$(BIN)/python -m pytest -q -m "not slow and not clinical"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

SPHINX := $(BIN)/python -m sphinx --fail-on-warning --keep-going -c scripts/docs -d output/doctrees

docs: $(VENV)/installed
	$(SPHINX) . output/site

links: $(VENV)/installed
	$(SPHINX) -b linkcheck -D nb_execution_mode=off . output/links

audit: $(VENV)/installed
	@$(MAKE) --silent $(TOOLS)/installed >/dev/null 2>&1 || true
	@$(BIN)/python -m scripts.checks.dependencies --audit $(TOOLS)/bin/pip-audit \
		--packages "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

sbom: $(VENV)/installed $(TOOLS)/installed
	mkdir -p output
	$(TOOLS)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml \
		--output-format JSON --output-file output/sbom.json

bundle: $(VENV)/installed
	$(BIN)/python -m scripts.checks.model_zoo $(if $(MODEL),--model $(MODEL))

test-clinical: $(VENV)/installed
	$(BIN)/python -m pytest tests/clinical --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10

charts:
	cd scripts/charts && npm ci --ignore-scripts --no-fund --no-audit && npm run build
	git diff --exit-code bundle/report/charts.js

SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

debian-packages:
	$(SUDO) apt-get update -qq
	$(SUDO) apt-get install -y -qq --no-install-recommends orthanc orthanc-dicomweb dcmtk dicom3tools chromium

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e ".[test]"
	touch $@

$(TOOLS)/installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install -q "pip-audit>=2.10,<3" "cyclonedx-bom>=7.5,<8"
	touch $@
