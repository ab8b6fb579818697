# Two commands set everything up on a fresh machine with Python 3.11 or later: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test fast check bench tables docs clean

demo: $(READY)
	$(BIN)/python examples/demo.py

# A process a core, but no more than memory has room for.
test: check
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# The inner loop: without tests that start processes, trace graphs or run whole studies.
fast: $(READY)
	$(BIN)/python -m pytest -m 'not slow' --numprocesses auto --maxprocesses 4 --dist worksteal

check: $(READY)
	$(BIN)/ruff check src tests benchmarks examples docs/*.py
	$(BIN)/ruff format --check src tests benchmarks examples docs/*.py
	$(BIN)/mypy

# What a step, a mask and a selection cost, and what cutting out gains, each against its plain counterpart in one process.
bench: $(READY)
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/speed.py

# The tables and figures of the README and docs, redrawn from benchmarks/results/.
tables: $(READY)
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/figures.py

# The documentation as a site in site/. A warning, such as a link that leads nowhere, is an error.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs build site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
