# Everything runs in .venv, which `make setup` builds with the pins of constraints.txt. PYTHON names another interpreter.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
WITH_PATH := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: setup run test test-all test-gpu lint docs

setup: $(STAMP)

$(STAMP): pyproject.toml pipeline/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed, and $(PYTHON) is not; name another one: make PYTHON=python3.12 setup" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0 -e ".[hf,onnx]" -e "pipeline[dev]"
	@touch $(STAMP)

# The quick grid takes the place of the profile in params.yaml, unless that is one of your own.
# Exit code 3 says that the data of some task could not be had; the report shows which, and the rest is done.
run: setup
	@$(WITH_PATH) $(BIN)/schoenbat-exp use quick
	@code=0; $(WITH_PATH) $(BIN)/schoenbat-exp run --grid || code=$$?; test $$code -eq 0 || test $$code -eq 3 || exit $$code

PYTEST := $(WITH_PATH) $(BIN)/python -m pytest

# Tests that share an expensive set-up stay in one process: their files are xdist groups.
test: setup
	$(PYTEST) -n 2 --dist loadgroup -m "not slow"

# After the quick tests, those that start grids, servers, browsers, TeX, Slurm, Sphinx, pip or compilers.
test-all: test
	$(PYTEST) -n 2 --dist loadgroup -m slow

test-gpu: setup
	$(PYTEST) -m gpu tests/gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy schoenbat pipeline

docs: setup
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/docs
	@echo "build/docs/docs/index.html"
