# Everything runs in its own virtual environment. TORCH is installed first and by its exact version, so that a CPU build
# of it can be there already (see README); PYTHON makes the environment.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PROMPT ?= a red circle moves right on a blue background
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/turbowan generate --prompt "$(PROMPT)" --out out/demo.mp4

test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses=auto --dist=worksteal

lint: $(VENV)/installed-test
	$(BIN)/ruff check turbowan tests __init__.py
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install "$(TORCH)" --editable ".[test,lint]"
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info
