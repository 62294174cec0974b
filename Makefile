# The commands of the README. Everything runs in .venv, made on first use and used again after that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
PARITY_VERSIONS := 4.57.6 5.23.0

.PHONY: demo test lint parity bench gpu wheels-gpu clean

demo: $(VENV)/.installed
	$(BIN)/ettin demo --out runs/demo $(DEMO_ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/pyright

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c "import sys; assert (3, 10) <= sys.version_info < (3, 13), 'Python 3.10 to 3.12 is needed; set PYTHON=...'"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .parity .wheels runs
