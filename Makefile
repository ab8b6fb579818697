# Two commands set everything up on a fresh machine with Python 3.11 or later: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := $(VENV)/.demo
# Modules are compiled when they are first imported: to compile all of them takes longer than the rest of the installation.
INSTALL := -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

# Compiled modules are kept: each process would compile the package, and each worker all tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo fast test suite slow test-cpu check bench bench-memory tables docs dist versions clean

demo: $(DEMO)
	$(BIN)/python examples/demo.py

# A process a core and one more, since some wait for what they started, but no more than memory has room for; each file
# in one of them, the long ones first.
PROCESSES := $(shell expr `getconf _NPROCESSORS_ONLN` + 1)
PYTEST := $(BIN)/python -m pytest --numprocesses $(PROCESSES) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The inner loop: without tests that start processes, trace graphs or run whole studies.
fast: $(READY)
	$(PYTEST) -m 'not integration and not slow'

# All that CI runs; the types are checked beside the tests.
test: $(READY)
	$(MAKE) --jobs 2 check suite

suite: $(READY)
	$(PYTEST) -m 'not slow'

# Runs at true size: minutes each.
slow: $(READY)
	$(BIN)/python -m pytest -m slow

# CPU seconds of each test file of `make test`, into benchmarks/results/.
test-cpu: $(READY)
	$(BIN)/python tests/cpu_seconds.py benchmarks/results/tests/cpu.json -m 'not slow'

check: $(READY)
	$(BIN)/ruff check src tests benchmarks examples docs/*.py
	$(BIN)/ruff format --check src tests benchmarks examples docs/*.py
	$(BIN)/mypy

# What a step, a mask and a selection cost, and what cutting out gains, each against its plain counterpart in one process.
bench: $(READY)
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/attach.py

# Peak memory and disk of runs at the size of a model: `make bench-memory MODEL=FOLDER`.
bench-memory: $(READY)
	$(BIN)/python benchmarks/memory.py --model $(MODEL)

# The tables and figures of the README and docs, redrawn from benchmarks/results/.
tables: $(READY)
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/figures.py

# The documentation as a site in site/. A warning, such as a link that leads nowhere, is an error.
docs: $(READY)
	$(BIN)/python $(INSTALL) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

# Wheel and sdist in dist/, each installed into an empty environment that runs the README's example.
dist: $(READY)
	$(BIN)/python tests/check_dist.py --out dist

# `make fast` on the lowest and the highest versions that pyproject.toml allows; needs uv and Python 3.11 to 3.13.
versions: $(READY)
	$(BIN)/python tests/check_versions.py --out benchmarks/results/tests/versions.json

# The demo needs neither the exporters nor Ray nor the tests' packages.
$(DEMO): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) -e '.[demo]'
	touch $(DEMO)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) -e '.[demo,dev]'
	touch $(DEMO) $(READY)

clean:
	rm -rf $(VENV) runs build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
