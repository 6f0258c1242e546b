PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
FAST := -m "not slow"

.PHONY: demo test test-floor test-newest lint bench clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest

# The fast part of the suite on the lowest versions that pyproject.toml allows, in a fresh environment.
test-floor:
	$(PYTHON) -m venv --clear .venv-floor
	.venv-floor/bin/python -m pip install --quiet --constraint constraints-floor.txt --editable ".[dev]"
	.venv-floor/bin/python -m pytest $(FAST)

# The same on the newest versions that pip finds, nothing pinned. PIP_PRE=1 takes pre-releases too.
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --editable ".[dev]"
	.venv-newest/bin/python -m pytest $(FAST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/speed.py --append benchmarks/RESULTS.md
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/conversion.py
	$(BIN)/python benchmarks/training.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-floor .venv-newest
