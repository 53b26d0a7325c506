# PSGL SDK. On a fresh machine each target sets itself up in .venv; nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
DATA ?=
OUT ?= runs/demo
IMAGE ?= runs/gateway-image
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.PHONY: help demo test check format bench chaos fuzz reproduce image image-run image-arm64 clean

help:
	@echo "make demo    train on MNIST over MQTT: broker, server, three devices   [DATA=x.npz OUT=dir ARGS=...]"
	@echo "make test    run every test (but one: ARGS=\"-m arm64\")"
	@echo "make check   format, lint, types, import rules"
	@echo "make bench   measure speed side by side with plain torch and bare MQTT"
	@echo "make chaos   kill devices, broker and server again and again; nothing may be lost   [ARGS=--quick]"
	@echo "make reproduce   measure again what the paper claims; hours on 2 cores   [DATA=folder ARGS=--quick]"
	@echo "make fuzz    hostile bytes for the parsers, at least 200,000 inputs"
	@echo "make image   a root file system for a gateway with the edge SDK alone, and its sizes; as root   [IMAGE=folder]"
	@echo "make image-run   train inside it; as root"
	@echo "make image-arm64   verify bundles with aarch64 wheels under qemu-user; as root"
	@echo "PIP_ARGS=... is passed to pip (an index of CPU-only torch builds, for example)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "could not make a virtual environment: install Python's venv module (Debian: python3-venv)"; exit 2; }

# Each stamp names the extra that is installed, editable, with the exact versions of constraints.txt.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing psgl[$*] into $(VENV) (the first time takes some minutes)"
	@$(PIP) -e '.[$*]'
	@touch $@

demo: $(VENV)/installed-demo
	@$(BIN)/python -m examples.quickstart $(if $(DATA),--data '$(DATA)') --out '$(OUT)' $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py tests/test_exports.py

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.step --json
	$(BIN)/python -m benchmarks.wire --json
	$(BIN)/python -m benchmarks.edge --json

chaos: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.chaos --json $(ARGS)

reproduce: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.reproduce $(if $(DATA),--data-folder '$(DATA)') $(ARGS)

fuzz: $(VENV)/installed-dev
	$(BIN)/python -m tests.fuzz --runs 200000 $(ARGS)

image: $(BIN)/python
	PYTHON='$(abspath $(BIN)/python)' examples/gateway-image/build.sh '$(IMAGE)'

image-run: $(VENV)/installed-export
	PYTHON='$(abspath $(BIN)/python)' examples/gateway-image/run.sh '$(IMAGE)'

image-arm64: $(VENV)/installed-export
	PYTHON='$(abspath $(BIN)/python)' examples/gateway-image/arm64.sh '$(IMAGE)'

clean:
	rm -rf $(VENV) build *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
